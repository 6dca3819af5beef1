"""Steps for the policy: labels, action chunks, states, masks at the end, augmentation that a resumed run repeats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lapa import config as configs
from lapa.data.dataset import Dataset
from lapa.data.labels import MANIFEST, EpisodeLabels, Labels, Manifest, shard_path, write_shard
from lapa.data.sampling import split_episodes
from lapa.data.spec import open_dataset
from lapa.data.steps import EpisodeSteps
from lapa.data.transforms import augment
from lapa.data.writer import DatasetWriter
from lapa.sources.synthetic import write_synthetic_dataset


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_synthetic_dataset(tmp_path_factory.mktemp("s") / "d", episodes=3, frames=10, actions=True)


@pytest.fixture(scope="module")
def labels(square: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Labels:
    """Labels with a horizon of 4 frames; episode 1 has none."""
    folder = tmp_path_factory.mktemp("labels")
    rng = np.random.default_rng(0)
    episodes = {number: EpisodeLabels(np.arange(6), rng.integers(0, 8, (6, 4))) for number in (0, 2)}
    write_shard(shard_path(folder, 0, 2), episodes)
    manifest = Manifest("lam", square.fingerprint, "front", 0.4, 4, 4, 8, 12, 3, 1, [[0.125] * 8] * 4)
    configs.save(manifest, folder / MANIFEST)
    return Labels.open(folder)


def test_labelled_steps(square: Dataset, labels: Labels) -> None:
    steps = EpisodeSteps([square], 32, labels=[labels])
    assert len(steps) == 12
    assert [steps.location(index) for index in (0, 5, 6)] == [(0, 0, 0), (0, 0, 5), (0, 2, 0)]
    item = steps[8]
    assert item["codes_L"].tolist() == labels.codes(2)[1][2].tolist()
    assert item["codes_L"].dtype == np.int64
    assert item["instruction"] == "move up"
    assert item["images"]["front"].shape == (32, 32, 3)
    assert item["index"] == 8
    assert item["has_codes"] is True and item["dataset"] == "d"
    assert "actions_KA" not in item and "state_S" not in item
    assert steps.describe(8) == "dataset d, episode 2, frame 2"


def test_action_chunks_end_with_the_episode(square: Dataset) -> None:
    steps = EpisodeSteps([square], 64, cameras=("front",), chunk=4)
    assert len(steps) == 30
    inside, last = steps[3], steps[18]
    assert (inside["actions_KA"] == square.actions(0)[3:7]).all()
    assert inside["action_mask_K"].tolist() == [True] * 4
    assert (inside["images"]["front"] == square.frames(0, [3])[0]).all()
    assert last["action_mask_K"].tolist() == [True, True, False, False]
    assert (last["actions_KA"] == square.actions(1)[[8, 9, 9, 9]]).all()
    assert steps.actions().shape == (30, 2)
    assert "codes_L" not in inside


def test_labels_beside_actions_leave_every_frame_an_item(square: Dataset, labels: Labels) -> None:
    steps = EpisodeSteps([square], 32, labels=[labels], chunk=3)
    assert len(steps) == 30
    for index in range(30):
        item, (_, episode, frame) = steps[index], steps.location(index)
        assert (episode, frame) == divmod(index, 10)
        assert item["has_codes"] is (episode != 1 and frame < 6)
        expected = labels.codes(episode)[1][frame] if item["has_codes"] else np.zeros(4)
        assert item["codes_L"].dtype == np.int64 and item["codes_L"].tolist() == expected.tolist()
        assert (item["actions_KA"][0] == square.actions(episode)[frame]).all()


def test_labels_need_not_begin_with_the_episode(square: Dataset, labels: Labels, tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, 0, 0), {0: EpisodeLabels(np.array([2, 3, 7]), np.array([[1], [2], [3]]))})
    configs.save(replace(labels.manifest, latent_length=1, num_rows=3), tmp_path / MANIFEST)
    steps = EpisodeSteps([square], 32, labels=[Labels.open(tmp_path)], chunk=1)
    codes = [(index, int(steps[index]["codes_L"][0])) for index in range(30) if steps[index]["has_codes"]]
    assert codes == [(2, 1), (3, 2), (7, 3)]


def test_items_bring_the_state_of_their_frame(square: Dataset, labels: Labels) -> None:
    acting = EpisodeSteps([square], 32, chunk=2, state=True)
    assert (acting[17]["state_S"] == square.states(1)[7]).all()
    assert acting[17]["state_S"].dtype == np.float32
    assert (acting.states() == np.concatenate([square.states(episode) for episode in range(3)])).all()
    labelled = EpisodeSteps([square], 32, labels=[labels], state=True)
    assert (labelled[8]["state_S"] == square.states(2)[2]).all()
    assert len(labelled.states()) == 20


def test_each_item_names_its_dataset(square: Dataset, tmp_path: Path) -> None:
    other = write_synthetic_dataset(tmp_path / "other", episodes=1, frames=4, actions=True)
    steps = EpisodeSteps([square, other], 32, chunk=1)
    assert [steps[index]["dataset"] for index in (0, 29, 30, 33)] == ["d", "d", "other", "other"]


@pytest.mark.parametrize("feature", ["action", "observation.state"])
def test_a_number_that_is_not_finite_is_named(feature: str, tmp_path: Path) -> None:
    dataset = write_synthetic_dataset(tmp_path / "robot", episodes=2, frames=6, actions=True)
    (path,) = dataset.root.glob("data/*/*.parquet")
    table = pq.read_table(path)
    values = table[feature].to_pylist()
    values[9][1] = float("nan")
    column = table.schema.get_field_index(feature)
    pq.write_table(table.set_column(column, feature, pa.array(values, table.schema.field(feature).type)), path)
    steps = EpisodeSteps([open_dataset(dataset.root)], 32, chunk=2, state=True)
    steps[5]
    with pytest.raises(ValueError, match=rf"robot/data.*{feature} of episode 1 is not finite at frame 3"):
        steps[8]
    with pytest.raises(ValueError, match="of episode 1 is not finite at frame 3"):
        steps.actions() if feature == "action" else steps.states()


def test_augmentation_depends_on_the_seed_and_the_draw(square: Dataset) -> None:
    first, second, other = (EpisodeSteps([square], 32, chunk=1, augment=True, seed=seed) for seed in (0, 0, 1))
    image = first[(4, 100)]["images"]["front"]
    second[(7, 3)]
    assert (image == second[(4, 100)]["images"]["front"]).all()
    assert (image != first[(4, 101)]["images"]["front"]).any()
    assert (image != other[(4, 100)]["images"]["front"]).any()


def test_steps_from_memory_and_from_video_agree(square: Dataset) -> None:
    kept, decoded = (EpisodeSteps([square], 32, chunk=2, cache_gib=gib) for gib in (1.0, 0.0))
    assert (kept.in_memory, decoded.in_memory) == (True, False)
    for index in range(0, 30, 4):
        assert (kept[index]["images"]["front"] == decoded[index]["images"]["front"]).all()


def test_splits_do_not_share_episodes(square: Dataset) -> None:
    train, held_out = (EpisodeSteps([square], 32, chunk=1, split=split) for split in ("train", "held_out"))
    assert len(train) + len(held_out) == 30
    assert not {train[i]["episode"] for i in range(len(train))} & {held_out[i]["episode"] for i in range(len(held_out))}


def test_without_a_held_out_label_the_training_episodes_are_evaluated_on(
    square: Dataset, labels: Labels, capsys: pytest.CaptureFixture
) -> None:
    # The seed that holds out episode 1, the one without labels.
    seed = next(seed for seed in range(20) if list(split_episodes(3, 0.1, seed, "held_out")) == [1])
    train, held_out = (EpisodeSteps([square], 32, labels=[labels], seed=seed, split=s) for s in ("train", "held_out"))
    assert len(train) == len(held_out) == 12
    assert "none of the held-out episodes has a label" in capsys.readouterr().err


def test_datasets_must_agree_on_the_width_of_actions(square: Dataset, tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "arm", fps=10, cameras={"front": (32, 32)}, action_names=["x", "y", "z"])
    writer.add_episode({"front": np.zeros((4, 32, 32, 3), np.uint8)}, "wait", actions=np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"differ in the width of their actions: {'d': 2, 'arm': 3}"):
        EpisodeSteps([square, writer.finish()], 32, chunk=1)


def test_datasets_must_agree_on_the_width_of_states(square: Dataset, tmp_path: Path) -> None:
    writer = DatasetWriter(
        tmp_path / "arm", fps=10, cameras={"front": (32, 32)}, action_names=["x", "y"], state_names=["x", "y", "z"]
    )
    images = np.zeros((4, 32, 32, 3), np.uint8)
    writer.add_episode({"front": images}, "wait", actions=np.zeros((4, 2)), states=np.zeros((4, 3)))
    arm = writer.finish()
    assert len(EpisodeSteps([square, arm], 32, chunk=1)) == 34
    with pytest.raises(ValueError, match=r"differ in the width of their state: {'d': 2, 'arm': 3}"):
        EpisodeSteps([square, arm], 32, chunk=1, state=True)


def test_what_cannot_be_trained_on_is_said(square: Dataset, labels: Labels, tmp_path: Path) -> None:
    video = write_synthetic_dataset(tmp_path / "video", episodes=2, frames=4)
    with pytest.raises(ValueError, match="has no actions"):
        EpisodeSteps([video], 32, chunk=4)
    with pytest.raises(ValueError, match="video: has no state; this needs a dataset with"):
        EpisodeSteps([square, video], 32, labels=[labels, labels], state=True)
    with pytest.raises(ValueError, match="video: has no state"):
        EpisodeSteps([video], 32, labels=[labels]).states()
    with pytest.raises(ValueError, match="nothing to learn"):
        EpisodeSteps([square], 32)
    with pytest.raises(ValueError, match="chunk is 0"):
        EpisodeSteps([square], 32, chunk=0)
    with pytest.raises(ValueError, match="need as many labels"):
        EpisodeSteps([square, video], 32, labels=[labels])
    with pytest.raises(ValueError, match="camera 'wrist'"):
        EpisodeSteps([square], 32, cameras=("wrist",), chunk=1)


def test_augmentation_by_nothing_is_the_picture_and_by_the_papers_amounts_stays_near() -> None:
    image = np.random.default_rng(0).integers(40, 216, (32, 32, 3), dtype=np.uint8)
    rng = np.random.default_rng(1)
    same = augment(image, rng, crop=1, brightness=0, contrast=0, hue=0, saturation=0, value=0)
    assert np.abs(same.astype(int) - image).max() <= 8, "rounding on the way to HSV and back"
    warmer = augment(np.full((8, 8, 3), (200, 60, 60), np.uint8), rng, crop=1, brightness=0, contrast=0, hue=20)
    assert warmer[0, 0].argmax() == 0 and tuple(warmer[0, 0]) != (200, 60, 60)

"""Steps for the policy: labels or action chunks, masks at the end, augmentation that a resumed run repeats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lapa import config as configs
from lapa.data.dataset import Dataset
from lapa.data.frames import split_episodes
from lapa.data.labels import MANIFEST, EpisodeLabels, Labels, Manifest, shard_path, write_shard
from lapa.data.sources.synthetic import write_synthetic_dataset
from lapa.data.steps import PolicySteps
from lapa.data.writer import DatasetWriter


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
    steps = PolicySteps([square], 32, labels=[labels])
    assert len(steps) == 12
    assert [steps.location(index) for index in (0, 5, 6)] == [(0, 0, 0), (0, 0, 5), (0, 2, 0)]
    item = steps[8]
    assert item["codes_L"].tolist() == labels.codes(2)[1][2].tolist()
    assert item["codes_L"].dtype == np.int64
    assert item["instruction"] == "move up"
    assert item["images"]["front"].shape == (32, 32, 3)
    assert item["index"] == 8
    assert "actions_KA" not in item
    assert steps.describe(8) == "dataset d, episode 2, frame 2"


def test_action_chunks_end_with_the_episode(square: Dataset) -> None:
    steps = PolicySteps([square], 64, cameras=("front",), chunk=4)
    assert len(steps) == 30
    inside, last = steps[3], steps[18]
    assert (inside["actions_KA"] == square.actions(0)[3:7]).all()
    assert inside["action_mask_K"].tolist() == [True] * 4
    assert (inside["images"]["front"] == square.frames(0, [3])[0]).all()
    assert last["action_mask_K"].tolist() == [True, True, False, False]
    assert (last["actions_KA"] == square.actions(1)[[8, 9, 9, 9]]).all()
    assert steps.actions().shape == (30, 2)


def test_augmentation_depends_on_the_seed_and_the_draw(square: Dataset) -> None:
    first, second, other = (PolicySteps([square], 32, chunk=1, augment=True, seed=seed) for seed in (0, 0, 1))
    picture = first[(4, 100)]["images"]["front"]
    second[(7, 3)]
    assert (picture == second[(4, 100)]["images"]["front"]).all()
    assert (picture != first[(4, 101)]["images"]["front"]).any()
    assert (picture != other[(4, 100)]["images"]["front"]).any()


def test_steps_from_memory_and_from_video_agree(square: Dataset) -> None:
    kept, decoded = (PolicySteps([square], 32, chunk=2, cache_gib=gib) for gib in (1.0, 0.0))
    assert (kept.in_memory, decoded.in_memory) == (True, False)
    for index in range(0, 30, 4):
        assert (kept[index]["images"]["front"] == decoded[index]["images"]["front"]).all()


def test_splits_do_not_share_episodes(square: Dataset) -> None:
    train, held_out = (PolicySteps([square], 32, chunk=1, split=split) for split in ("train", "held_out"))
    assert len(train) + len(held_out) == 30
    assert not {train[i]["episode"] for i in range(len(train))} & {held_out[i]["episode"] for i in range(len(held_out))}


def test_without_a_held_out_label_the_training_episodes_are_evaluated_on(
    square: Dataset, labels: Labels, capsys: pytest.CaptureFixture
) -> None:
    # The seed that holds out episode 1, the one without labels.
    seed = next(seed for seed in range(20) if list(split_episodes(3, 0.1, seed, "held_out")) == [1])
    train, held_out = (PolicySteps([square], 32, labels=[labels], seed=seed, split=s) for s in ("train", "held_out"))
    assert len(train) == len(held_out) == 12
    assert "none of the held-out episodes has a label" in capsys.readouterr().err


def test_datasets_must_agree_on_the_width_of_actions(square: Dataset, tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "arm", fps=10, cameras={"front": (32, 32)}, action_names=["x", "y", "z"])
    writer.add_episode({"front": np.zeros((4, 32, 32, 3), np.uint8)}, "wait", actions=np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"differ in the width of their actions: {'d': 2, 'arm': 3}"):
        PolicySteps([square, writer.finish()], 32, chunk=1)


def test_what_cannot_be_trained_on_is_said(square: Dataset, labels: Labels, tmp_path: Path) -> None:
    video = write_synthetic_dataset(tmp_path / "video", episodes=2, frames=4)
    with pytest.raises(ValueError, match="has no actions"):
        PolicySteps([video], 32, chunk=4)
    with pytest.raises(ValueError, match="either labels"):
        PolicySteps([square], 32)
    with pytest.raises(ValueError, match="need as many labels"):
        PolicySteps([square, video], 32, labels=[labels])
    with pytest.raises(ValueError, match="camera 'wrist'"):
        PolicySteps([square], 32, cameras=("wrist",), chunk=1)

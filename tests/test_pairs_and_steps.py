"""Frame pairs, policy steps and mixtures: horizons, splits by episode, the cache equal to decoding, shares of draws."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lapa import config as configs
from lapa.data.dataset import Dataset
from lapa.data.labels import MANIFEST, EpisodeLabels, Labels, Manifest, shard_path, write_shard
from lapa.data.pairs import FramePairs, PairsConfig, collate_pairs, horizon_frames
from lapa.data.sampling import (
    ItemIndex,
    Mixture,
    episodes_of_split,
    episodes_of_training,
    require_names,
    require_plain,
    split_episodes,
)
from lapa.data.spec import open_dataset
from lapa.data.steps import EpisodeSteps
from lapa.data.transforms import augment
from lapa.data.video import encode_clip
from lapa.data.writer import DatasetWriter
from lapa.engine.batches import BLOCK, Draw, Mixed, StepSampler, batch_loader
from lapa.files import read_json, write_json
from lapa.latent import probe
from lapa.latent import train as training
from lapa.latent.config import ProbeConfig
from lapa.latent.model import LatentActionModel, horizon_for
from lapa.presets import LATENT
from lapa.sources.synthetic import moving_squares, write_synthetic_dataset
from lapa.verdicts import Verdict


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_synthetic_dataset(tmp_path_factory.mktemp("s") / "ten", episodes=5, frames=12, actions=True)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_synthetic_dataset(tmp_path_factory.mktemp("f") / "thirty", episodes=3, frames=25, size=48, fps=30.0)


def test_the_horizon_is_seconds_at_each_datasets_own_rate(square: Dataset, fast: Dataset) -> None:
    pairs = FramePairs([square, fast], PairsConfig(size=32, horizon=0.6), split="all")
    assert pairs.horizon_frames == (6, 18)
    assert len(pairs) == 5 * (12 - 6) + 3 * (25 - 18)


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_every_pair_is_the_slow_literal_one(square: Dataset, fast: Dataset, cache_gib: float) -> None:
    pairs = FramePairs([square, fast], PairsConfig(size=64, horizon=0.6, cache_gib=cache_gib), split="all")
    assert pairs.in_memory == (cache_gib > 0)
    expected = [
        (number, episode.index, frame)
        for number, (dataset, horizon) in enumerate(((square, 6), (fast, 18)))
        for episode in dataset.episodes
        for frame in range(episode.length - horizon)
    ]
    assert [pairs.location(index) for index in range(len(pairs))] == expected
    for index in range(0, 30, 7):
        _, episode, frame = expected[index]
        literal = square.frames(episode)[[frame, frame + 6]].transpose(0, 3, 1, 2)
        item = pairs[index]
        assert (item["frames_TCHW"] == literal).all()
        assert (item["index"], item["episode"]) == (index, episode)
    with pytest.raises(IndexError):
        pairs.location(len(pairs))


def test_the_cache_and_the_decoder_give_the_same_bytes(fast: Dataset) -> None:
    kept, decoded = (FramePairs([fast], PairsConfig(size=32, cache_gib=gib), split="all") for gib in (1.0, 0.0))
    for index in range(len(kept)):
        assert (kept[index]["frames_TCHW"] == decoded[index]["frames_TCHW"]).all()


def test_actions_between_are_those_of_the_frames(square: Dataset) -> None:
    pairs = FramePairs([square], PairsConfig(size=32, horizon=0.3), split="all")
    index = next(i for i in range(len(pairs)) if pairs.location(i) == (0, 2, 4))
    assert (pairs.actions_between(index) == square.actions(2)[4:7]).all()
    assert pairs.describe(index) == "dataset ten, episode 2, frames 4 and 7"


def test_splits_are_by_episode_and_from_the_seed(square: Dataset) -> None:
    config = PairsConfig(size=32, held_out=0.4)
    train, held_out, again = (FramePairs([square], config, split, seed=3) for split in ("train", "held_out", "train"))
    episodes = [{pairs.location(i)[1] for i in range(len(pairs))} for pairs in (train, held_out)]
    assert episodes[0] | episodes[1] == set(range(5))
    assert not episodes[0] & episodes[1]
    assert len(episodes[1]) == 2
    assert [train.location(i) for i in range(len(train))] == [again.location(i) for i in range(len(again))]


def test_split_episodes() -> None:
    assert list(split_episodes(1, 0.1, 0, "train")) == [0]
    assert list(split_episodes(1, 0.1, 0, "held_out")) == []
    assert len(split_episodes(2, 0.1, 0, "held_out")) == 1
    assert len(split_episodes(50, 0.0, 0, "held_out")) == 0
    assert len(split_episodes(2, 0.8, 0, "train")) == len(split_episodes(3, 0.99, 0, "train")) == 1
    with pytest.raises(ValueError, match="it is 'train'"):
        split_episodes(5, 0.1, 0, "test")


def test_a_dataset_that_is_listed_twice_has_one_split(tmp_path: Path) -> None:
    twice = [write_synthetic_dataset(tmp_path / "d", episodes=10, frames=8)] * 2
    training, held_out = (episodes_of_split(twice, split, 0.3, 5) for split in ("train", "held_out"))
    assert len(held_out[0]) == 3 and held_out[0].tolist() == held_out[1].tolist()
    assert not set(held_out[0]) & set(training[1])
    recorded = {"dataset_fingerprints": [twice[0].fingerprint] * 2, "held_out": 0.3, "seed": 5}
    assert episodes_of_training(recorded, twice[0].fingerprint, 10).tolist() == training[0].tolist()
    assert not len(episodes_of_training(recorded, "f" * 16, 10))


def test_a_single_episode_is_trained_and_evaluated_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    single = write_synthetic_dataset(tmp_path / "one", episodes=1, frames=10)
    train, held_out = (FramePairs([single], PairsConfig(size=32), split) for split in ("train", "held_out"))
    assert len(train) == len(held_out) == 4
    assert "no episode can be held out" in capsys.readouterr().err


def test_episodes_shorter_than_the_horizon_are_skipped_and_counted(tmp_path: Path, capsys) -> None:
    writer = DatasetWriter(tmp_path / "mixed", fps=10, cameras={"front": (32, 32)})
    for length in (3, 9, 6):
        writer.add_episode({"front": np.zeros((length, 32, 32, 3), np.uint8)}, "wait")
    dataset = writer.finish()
    pairs = FramePairs([dataset], PairsConfig(size=32, horizon=0.6), split="all")
    assert pairs.num_skipped == (2,)
    assert [pairs.location(i) for i in range(len(pairs))] == [(0, 1, 0), (0, 1, 1), (0, 1, 2)]
    assert "2 of 3 episodes skipped" in capsys.readouterr().err
    with pytest.raises(ValueError, match="all 3 episodes are too short for a horizon of 2 s"):
        FramePairs([dataset], PairsConfig(size=32, horizon=2.0))


def test_a_horizon_is_whole_frames_and_never_silently_another(square: Dataset, capsys) -> None:
    assert [horizon_frames(seconds, 10.0) for seconds in (0.05, 0.1, 0.149, 0.6)] == [1, 1, 1, 6]
    with pytest.raises(ValueError, match=r"horizon of 0\.01 s is less than half a frame at 10 fps; give 0\.1 or more"):
        FramePairs([square], PairsConfig(size=32, horizon=0.01))
    with pytest.raises(ValueError, match="horizon is nan seconds"):
        FramePairs([square], PairsConfig(size=32, horizon=float("nan")))
    FramePairs([square], PairsConfig(size=32, horizon=0.6))
    assert "rounded" not in capsys.readouterr().err
    FramePairs([square], PairsConfig(size=32, horizon=0.26))
    assert "the horizon of 0.26 s is rounded to 0.3 s (3 frames at 10 fps)" in capsys.readouterr().err


def test_a_camera_that_is_not_there_is_corrected(square: Dataset) -> None:
    with pytest.raises(ValueError, match="did you mean 'front'"):
        FramePairs([square], PairsConfig(size=32, camera="fron"))


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_what_one_process_gives(square: Dataset, cache_gib: float, context: str) -> None:
    pairs = FramePairs([square], PairsConfig(size=32, cache_gib=cache_gib), split="all")
    alone = [collate_pairs([pairs[i] for i in range(j, j + 10)]) for j in (0, 10, 20)]
    loader = DataLoader(pairs, 10, num_workers=2, collate_fn=collate_pairs, multiprocessing_context=context)
    for batch, expected in zip(loader, alone, strict=True):
        assert torch.equal(batch["frames_BTCHW"], expected["frames_BTCHW"])
        assert torch.equal(batch["index"], expected["index"])
    assert batch["frames_BTCHW"].shape == (10, 2, 3, 32, 32)
    assert batch["index"].dtype == torch.int64


def test_a_square_moves_the_way_it_says() -> None:
    frames_NTCHW, directions_N = moving_squares(64, seed=1)
    assert set(directions_N) == set(range(8))
    for frames_TCHW, direction in zip(frames_NTCHW, directions_N, strict=True):
        contrast_THW = np.abs(frames_TCHW - np.median(frames_TCHW, axis=(2, 3), keepdims=True)).sum(axis=1)
        centres = [np.argwhere(contrast_HW > 50).mean(axis=0) for contrast_HW in contrast_THW]
        down, right = centres[1] - centres[0]
        assert round(np.degrees(np.arctan2(-down, right)) / 45) % 8 == direction


def test_the_frame_halfway_and_the_known_actions_come_along_where_asked_for(tmp_path: Path) -> None:
    dataset = write_synthetic_dataset(tmp_path / "squares", episodes=8, frames=12, size=32, fps=10, actions=True)
    config = PairsConfig(size=32, horizon=0.4, held_out=0.0, middle=True, action_share=0.25)
    pairs = FramePairs([dataset], config, split="all")
    items = [pairs[index] for index in range(len(pairs))]
    known = {item["episode"] for item in items if np.isfinite(item["actions_A"]).all()}
    assert len(known) == 2
    assert len(pairs.known_actions()) == 2 * (12 - 4)
    for index, item in enumerate(items):
        _, episode, frame = pairs.location(index)
        if frame + 2 + 4 < 12:
            assert (item["middle_CHW"] == pairs[index + 2]["frames_TCHW"][0]).all()
        if episode in known:
            np.testing.assert_allclose(item["actions_A"], pairs.actions_between(index).mean(axis=0), rtol=1e-5)
        else:
            assert np.isnan(item["actions_A"]).all()
    batch = collate_pairs(items[:5])
    assert batch["middle_BCHW"].shape == (5, 3, 32, 32)
    assert batch["actions_BA"].shape == (5, 2)


def test_what_cannot_come_along_is_said(square: Dataset, fast: Dataset) -> None:
    with pytest.raises(ValueError, match="none has actions"):
        FramePairs([fast], PairsConfig(size=32, action_share=0.5))
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="it must be a share from 0 to 1"):
            FramePairs([square], PairsConfig(size=32, action_share=share))
    with pytest.raises(ValueError, match="is a single frame, which has none halfway"):
        FramePairs([square], PairsConfig(size=32, horizon=0.1, middle=True))


class Store(AsyncFileSystemWrapper):
    """This machine's files as an asynchronous file system, as those of s3 and gs are: it stops working in a fork."""

    protocol = "store"

    def __init__(self, **options: object) -> None:
        super().__init__(LocalFileSystem(), asynchronous=False)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("store://")


@pytest.mark.filterwarnings("ignore:UPath 'store' filesystem")
def test_workers_read_a_store_whose_connections_do_not_survive_a_fork(square: Dataset) -> None:
    fsspec.register_implementation("store", Store, clobber=True)
    pairs = FramePairs([open_dataset(f"store://{square.root}")], PairsConfig(size=32, cache_gib=0.0), "all")
    read = []
    for workers in (0, 1):
        sampler = StepSampler(len(pairs), 4, seed=0, first_step=0, last_step=2)
        loader = batch_loader(pairs, collate_pairs, sampler, workers=workers, pin_memory=False)
        read.append(torch.cat([batch["frames_BTCHW"] for batch in loader]))
    assert torch.equal(*read)


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_synthetic_dataset(tmp_path_factory.mktemp("s") / "d", episodes=3, frames=10, actions=True)


@pytest.fixture(scope="module")
def labels(demos: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Labels:
    """Labels with a horizon of 4 frames; episode 1 has none."""
    folder = tmp_path_factory.mktemp("labels")
    rng = np.random.default_rng(0)
    episodes = {number: EpisodeLabels(np.arange(6), rng.integers(0, 8, (6, 4))) for number in (0, 2)}
    write_shard(shard_path(folder, 0, 2), episodes)
    manifest = Manifest("lam", demos.fingerprint, "front", 0.4, 4, 4, 8, 12, 3, 1, [[0.125] * 8] * 4)
    configs.save(manifest, folder / MANIFEST)
    return Labels.open(folder)


def test_labelled_steps(demos: Dataset, labels: Labels) -> None:
    steps = EpisodeSteps([demos], 32, labels=[labels])
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


def test_action_chunks_end_with_the_episode(demos: Dataset) -> None:
    steps = EpisodeSteps([demos], 64, cameras=("front",), chunk=4)
    assert len(steps) == 30
    inside, last = steps[3], steps[18]
    assert (inside["actions_KA"] == demos.actions(0)[3:7]).all()
    assert inside["action_mask_K"].tolist() == [True] * 4
    assert (inside["images"]["front"] == demos.frames(0, [3])[0]).all()
    assert last["action_mask_K"].tolist() == [True, True, False, False]
    assert (last["actions_KA"] == demos.actions(1)[[8, 9, 9, 9]]).all()
    assert steps.actions().shape == (30, 2)
    assert "codes_L" not in inside


def test_labels_beside_actions_leave_every_frame_an_item(demos: Dataset, labels: Labels) -> None:
    steps = EpisodeSteps([demos], 32, labels=[labels], chunk=3)
    assert len(steps) == 30
    for index in range(30):
        item, (_, episode, frame) = steps[index], steps.location(index)
        assert (episode, frame) == divmod(index, 10)
        assert item["has_codes"] is (episode != 1 and frame < 6)
        expected = labels.codes(episode)[1][frame] if item["has_codes"] else np.zeros(4)
        assert item["codes_L"].dtype == np.int64 and item["codes_L"].tolist() == expected.tolist()
        assert (item["actions_KA"][0] == demos.actions(episode)[frame]).all()


def test_labels_need_not_begin_with_the_episode(demos: Dataset, labels: Labels, tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, 0, 0), {0: EpisodeLabels(np.array([2, 3, 7]), np.array([[1], [2], [3]]))})
    configs.save(replace(labels.manifest, latent_length=1, num_rows=3), tmp_path / MANIFEST)
    steps = EpisodeSteps([demos], 32, labels=[Labels.open(tmp_path)], chunk=1)
    codes = [(index, int(steps[index]["codes_L"][0])) for index in range(30) if steps[index]["has_codes"]]
    assert codes == [(2, 1), (3, 2), (7, 3)]


def test_items_bring_the_state_of_their_frame(demos: Dataset, labels: Labels) -> None:
    acting = EpisodeSteps([demos], 32, chunk=2, state=True)
    assert (acting[17]["state_S"] == demos.states(1)[7]).all()
    assert acting[17]["state_S"].dtype == np.float32
    assert (acting.states() == np.concatenate([demos.states(episode) for episode in range(3)])).all()
    labelled = EpisodeSteps([demos], 32, labels=[labels], state=True)
    assert (labelled[8]["state_S"] == demos.states(2)[2]).all()
    assert len(labelled.states()) == 20


def test_each_item_names_its_dataset(demos: Dataset, tmp_path: Path) -> None:
    other = write_synthetic_dataset(tmp_path / "other", episodes=1, frames=4, actions=True)
    steps = EpisodeSteps([demos, other], 32, chunk=1)
    assert [steps[index]["dataset"] for index in (0, 29, 30, 33)] == ["d", "d", "other", "other"]


@pytest.mark.parametrize("feature", ["action", "observation.state"])
@pytest.mark.usefixtures("edited_datasets")
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


def test_augmentation_depends_on_the_seed_and_the_draw(demos: Dataset) -> None:
    first, second, other = (EpisodeSteps([demos], 32, chunk=1, augment=True, seed=seed) for seed in (0, 0, 1))
    image = first[(4, 100)]["images"]["front"]
    second[(7, 3)]
    assert (image == second[(4, 100)]["images"]["front"]).all()
    assert (image != first[(4, 101)]["images"]["front"]).any()
    assert (image != other[(4, 100)]["images"]["front"]).any()


def test_steps_from_memory_and_from_video_agree(demos: Dataset) -> None:
    kept, decoded = (EpisodeSteps([demos], 32, chunk=2, cache_gib=gib) for gib in (1.0, 0.0))
    assert (kept.in_memory, decoded.in_memory) == (True, False)
    for index in range(0, 30, 4):
        assert (kept[index]["images"]["front"] == decoded[index]["images"]["front"]).all()


def test_splits_do_not_share_episodes(demos: Dataset) -> None:
    train, held_out = (EpisodeSteps([demos], 32, chunk=1, split=split) for split in ("train", "held_out"))
    assert len(train) + len(held_out) == 30
    assert not {train[i]["episode"] for i in range(len(train))} & {held_out[i]["episode"] for i in range(len(held_out))}


def test_without_a_held_out_label_the_training_episodes_are_evaluated_on(
    demos: Dataset, labels: Labels, capsys: pytest.CaptureFixture
) -> None:
    # The seed that holds out episode 1, the one without labels.
    seed = next(seed for seed in range(20) if list(split_episodes(3, 0.1, seed, "held_out")) == [1])
    train, held_out = (EpisodeSteps([demos], 32, labels=[labels], seed=seed, split=s) for s in ("train", "held_out"))
    assert len(train) == len(held_out) == 12
    assert "none of the held-out episodes has a label" in capsys.readouterr().err


def test_datasets_must_agree_on_the_width_of_actions(demos: Dataset, tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "arm", fps=10, cameras={"front": (32, 32)}, action_names=["x", "y", "z"])
    writer.add_episode({"front": np.zeros((4, 32, 32, 3), np.uint8)}, "wait", actions=np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"differ in the width of their actions: {'d': 2, 'arm': 3}"):
        EpisodeSteps([demos, writer.finish()], 32, chunk=1)


def test_datasets_must_agree_on_the_width_of_states(demos: Dataset, tmp_path: Path) -> None:
    writer = DatasetWriter(
        tmp_path / "arm", fps=10, cameras={"front": (32, 32)}, action_names=["x", "y"], state_names=["x", "y", "z"]
    )
    images = np.zeros((4, 32, 32, 3), np.uint8)
    writer.add_episode({"front": images}, "wait", actions=np.zeros((4, 2)), states=np.zeros((4, 3)))
    arm = writer.finish()
    assert len(EpisodeSteps([demos, arm], 32, chunk=1)) == 34
    with pytest.raises(ValueError, match=r"differ in the width of their state: {'d': 2, 'arm': 3}"):
        EpisodeSteps([demos, arm], 32, chunk=1, state=True)


def test_what_cannot_be_trained_on_is_said(demos: Dataset, labels: Labels, tmp_path: Path) -> None:
    video = write_synthetic_dataset(tmp_path / "video", episodes=2, frames=4)
    with pytest.raises(ValueError, match="has no actions"):
        EpisodeSteps([video], 32, chunk=4)
    with pytest.raises(ValueError, match="video: has no state; this needs a dataset with"):
        EpisodeSteps([demos, video], 32, labels=[labels, labels], state=True)
    with pytest.raises(ValueError, match="video: has no state"):
        EpisodeSteps([video], 32, labels=[labels]).states()
    with pytest.raises(ValueError, match="nothing to learn"):
        EpisodeSteps([demos], 32)
    with pytest.raises(ValueError, match="chunk is 0"):
        EpisodeSteps([demos], 32, chunk=0)
    with pytest.raises(ValueError, match="need as many labels"):
        EpisodeSteps([demos, video], 32, labels=[labels])
    with pytest.raises(ValueError, match="camera 'wrist'"):
        EpisodeSteps([demos], 32, cameras=("wrist",), chunk=1)


def test_augmentation_by_nothing_is_the_image() -> None:
    image = np.random.default_rng(0).integers(40, 216, (32, 32, 3), dtype=np.uint8)
    rng = np.random.default_rng(1)
    same = augment(image, rng, crop=1, brightness=0, contrast=0, hue=0, saturation=0, value=0)
    assert np.abs(same.astype(int) - image).max() <= 8, "rounding on the way to HSV and back"


def test_augmentation_changes_a_colour_by_at_most_the_papers_amounts() -> None:
    rng = np.random.default_rng(1)
    warmer = augment(np.full((8, 8, 3), (200, 60, 60), np.uint8), rng, crop=1, brightness=0, contrast=0, hue=20)
    assert warmer[0, 0].argmax() == 0 and tuple(warmer[0, 0]) != (200, 60, 60)
    grey = np.full((8, 8, 3), 128, np.uint8)
    changes = [np.abs(augment(grey, rng).max(-1).astype(int) - 128).max() for _ in range(200)]
    assert 40 < max(changes) <= 0.2 * 255 + 20 + 1, "brightness, and the value of HSV"


DEBUG = LATENT["debug"]
GROUPS = ((50, 50.0), (7, 3.5), (0, 9.0), (400, 0.02), (1000, 21.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder, and a folder of clips to read in place, of another rate, half of which stand still."""
    root = tmp_path_factory.mktemp("mixture")
    write_synthetic_dataset(root / "squares", episodes=6, frames=12, size=32, fps=10, actions=True)
    (root / "own clips é").mkdir()
    for number, (frames_TCHW, _) in enumerate(zip(*moving_squares(6, seed=3, size=32), strict=True)):
        first, second = frames_TCHW.transpose(0, 2, 3, 1)
        frames = [first, first, first, second, second, second] * 4 if number % 2 else [first] * 24
        encode_clip(root / "own clips é" / f"{number}.mp4", frames, fps=20)
    return root


def specs(root: Path, options: str = ",horizon=0.2") -> tuple[str, str]:
    return f"{root / 'squares'}:1.0", f"own=videos:{root / 'own clips é'},caption=look{options}:0.25"


def samples(groups=GROUPS, first_step: int = 0, last_step: int = 200, **options) -> list[Draw]:
    total = sum(size for size, _ in groups)
    sampler = StepSampler(total, 12, seed=1, first_step=first_step, last_step=last_step, groups=groups, **options)
    return [draw for batch in sampler for draw in batch]


def test_counts_are_the_shares_to_within_rounding_however_long_the_run() -> None:
    mixed = Mixed(GROUPS, seed=0)
    weights = np.array([weight if size else 0 for size, weight in GROUPS])
    before = np.zeros(len(GROUPS))
    for num_draws in [*range(3000), *(10**9 + n for n in range(50))]:
        counts = np.array(mixed.counts(num_draws))
        assert counts.sum() == num_draws
        assert np.abs(counts - num_draws * weights / weights.sum()).max() <= len(GROUPS) / 2
        if 0 < num_draws < 3000:
            assert sorted(counts - before) == [0, 0, 0, 0, 1], "one draw more is one part's"
        before = counts


def test_places_are_those_of_a_literal_count() -> None:
    mixed = Mixed(GROUPS, seed=0)
    seen = dict.fromkeys(range(len(GROUPS)), 0)
    for number in range(3 * BLOCK + 5):
        part, before = mixed.place(number)
        assert before == seen[part]
        seen[part] += 1
    assert Mixed(GROUPS, seed=0).place(2 * BLOCK + 17) == mixed.place(2 * BLOCK + 17), "without what came before"
    assert any(Mixed(GROUPS, seed=1).place(number) != mixed.place(number) for number in range(50))
    assert len({mixed.place(number)[0] for number in range(20)}) > 1, "shuffled, not part by part"


def test_each_part_is_gone_through_in_permutations_of_its_own() -> None:
    draws = [draw.sample for draw in samples()]
    first = [sample for sample in draws if sample < 50]
    assert sorted(first[:50]) == list(range(50)) == sorted(first[50:100])
    assert first[:50] != first[50:100]
    second = [sample - 50 for sample in draws if 50 <= sample < 57]
    assert sorted(second[:7]) == list(range(7))
    assert max(draws) < 50 + 7 + 400 + 1000


def test_the_order_does_not_depend_on_where_a_run_resumes_nor_on_processes() -> None:
    whole = samples()
    assert samples(first_step=130) == whole[130 * 12 :]
    shares = [
        StepSampler(1457, 12, seed=1, first_step=0, last_step=9, accumulate=3, rank=rank, world=2, groups=GROUPS)
        for rank in (0, 1)
    ]
    assert sorted(draw for share in shares for batch in share for draw in batch) == sorted(whole[: 9 * 12])


def test_parts_that_make_no_mixture_are_refused() -> None:
    for groups, message in {
        ((3, 0.0), (0, 1.0)): "no part of the mixture has both",
        ((3, -1.0), (3, 1.0)): "none is below 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            Mixed(groups, seed=0)
    with pytest.raises(ValueError, match=r"the dataset 5"):
        StepSampler(5, 1, seed=0, first_step=0, last_step=1, groups=((3, 1.0),))


def test_shares_are_by_weight_times_frames_or_episodes_or_by_weight_alone(root: Path, capsys) -> None:
    datasets = [open_dataset(spec) for spec in specs(root)]
    both = ItemIndex([np.arange(6), np.arange(3)], [np.full(6, 10), np.full(3, 40)])
    shares = {by: Mixture.of(datasets, both, by).shares for by in ("frames", "episodes", "equal")}
    expected = {"frames": 60 / 90, "episodes": 6 / 6.75, "equal": 1 / 1.25}
    for by, share in expected.items():
        assert shares[by] == pytest.approx((share, 1 - share))
    Mixture.of(datasets, both, "frames").report(1000)
    printed = capsys.readouterr().err
    assert "66.7%" in printed and "11.11" in printed and "2.78" in printed, "shares, and epochs of 1000 draws"
    lacking = Mixture.of(datasets, ItemIndex([np.arange(6), np.arange(0)], [np.full(6, 10), np.arange(0)]), "equal")
    assert lacking.groups is None and lacking.shares == (1, 0)
    lacking.report(10)
    assert "own: nothing of it is trained on" in " ".join(capsys.readouterr().err.split())


def test_equal_weights_by_frames_keep_the_order_of_one_pool(root: Path) -> None:
    alike = [open_dataset(f"{root / 'squares'}:0.5"), open_dataset(f"{root / 'squares'}:0.5")]
    pairs = FramePairs(alike, PairsConfig(size=32, horizon=0.3, held_out=0.0))
    assert pairs.groups is None
    drawn = [d.sample for b in StepSampler(len(pairs), 9, seed=4, first_step=0, last_step=24, groups=None) for d in b]
    literal = [np.random.default_rng([4, epoch]).permutation(len(pairs)) for epoch in (0, 1)]
    assert drawn == np.concatenate(literal)[: len(drawn)].tolist()
    assert FramePairs(alike, replace(pairs.config, mix_by="equal")).groups == ((54, 0.5), (54, 0.5))


def test_pairs_of_a_mixture_are_drawn_alike_by_any_number_of_workers(root: Path) -> None:
    datasets = [open_dataset(spec) for spec in specs(root)]
    pairs = FramePairs(datasets, PairsConfig(size=32, horizon=0.3, held_out=0.0, mix_by="equal", min_motion=0.005))
    assert [pairs.index_of(*pairs.location(index)) for index in range(len(pairs))] == list(range(len(pairs)))
    batches = []
    for workers in (0, 2):
        sampler = StepSampler(len(pairs), 10, seed=0, first_step=3, last_step=7, groups=pairs.groups)
        batches.append(list(batch_loader(pairs, collate_pairs, sampler, workers=workers, pin_memory=False)))
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one["index"], other["index"]) and torch.equal(one["frames_BTCHW"], other["frames_BTCHW"])
    of_second = torch.cat([batch["index"] for batch in batches[0]]) >= pairs.groups[0][0]
    assert abs(int(of_second.sum()) - 8) < 7, "a fifth of forty"


def test_names_and_weights_that_do_not_fit_are_refused_with_the_mend(root: Path) -> None:
    squares = open_dataset(root / "squares")
    with pytest.raises(ValueError, match=r"has the name 'squares' of another one.*--data NAME="):
        require_names([squares, squares])
    require_plain([squares], "lapa baseline video", "--horizon-seconds")
    for spec, message in zip((f"{squares.root}:2", f"{squares.root},horizon=1"), ("weight", "horizon"), strict=True):
        with pytest.raises(ValueError, match=f"leave out.*{message}"):
            require_plain([open_dataset(spec)], "lapa baseline video", "--horizon-seconds")


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_pairs_that_do_not_move_are_left_out_and_counted(root: Path, capsys, cache_gib: float) -> None:
    clips = open_dataset(specs(root)[1])
    config = PairsConfig(size=32, held_out=0.0, min_motion=0.02, cache_gib=cache_gib)
    plain = FramePairs([clips], replace(config, min_motion=0.0))
    moving = FramePairs([clips], config)
    printed = " ".join(capsys.readouterr().err.split())
    assert f"own: {moving.num_still[0]} of {len(plain)} pairs" in printed and "warning" in printed, "more than half"
    assert len(moving) + moving.num_still[0] == len(plain)
    kept = [moving.location(index) for index in range(len(moving))]
    assert {episode for _, episode, _ in kept} == {1, 3, 5}, "the even clips stand still"
    for index, place in enumerate(kept):
        assert moving.index_of(*place) == index
        item = moving[index]["frames_TCHW"]
        assert (item == plain[plain.index_of(*place)]["frames_TCHW"]).all()
        assert np.abs(item[0].astype(int) - item[1]).mean() > 0.5
    assert len(FramePairs([clips], replace(config, held_out=0.5), "held_out")) == 3 * (24 - 4), (
        "held-out pairs all stay"
    )


def test_nothing_that_moves_is_an_error(root: Path, tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "still", fps=10, cameras={"front": (32, 32)})
    writer.add_episode({"front": np.full((9, 32, 32, 3), 99, np.uint8)}, "wait")
    datasets = [open_dataset(root / "squares"), writer.finish()]
    with pytest.raises(ValueError, match=r"still: none of its 6 pairs changes by --min-motion 0\.01, 0\.0000 at most"):
        FramePairs(datasets, PairsConfig(size=32, horizon=0.3, min_motion=0.01))
    with pytest.raises(ValueError, match="it lies from 0"):
        FramePairs(datasets, PairsConfig(size=32, min_motion=float("nan")))


def test_a_horizon_of_its_own_goes_before_the_common_one(root: Path) -> None:
    pairs = FramePairs([open_dataset(spec) for spec in specs(root)], PairsConfig(size=32, horizon=0.6), "all")
    assert (pairs.horizons, pairs.horizon_frames) == ((0.6, 0.2), (6, 4))
    with pytest.raises(ValueError, match="too short for a horizon of 9 s"):
        FramePairs([open_dataset(specs(root, ",horizon=9")[1])], PairsConfig(size=32))


def test_a_model_trains_on_a_mixture_in_place_resumes_exactly_and_knows_its_horizons(
    root: Path, tmp_path: Path
) -> None:
    """A dataset folder and a folder of videos, unequal weights, a horizon of its own, still pairs left out."""
    loop = replace(DEBUG.loop, steps=4, batch_size=8)
    config = replace(DEBUG, data=specs(root), out=tmp_path / "whole", loop=loop, mix_by="episodes", min_motion=0.01)
    training.run(config)
    parts = replace(config, out=tmp_path / "parts")
    training.run(replace(parts, loop=replace(loop, stop_after=2, workers=1)))
    with pytest.raises(ValueError, match="mix_by was 'episodes', is 'equal'"):
        training.run(replace(parts, mix_by="equal", resume=True, loop=replace(loop, workers=1)))
    training.run(replace(parts, resume=True, loop=replace(loop, workers=1)))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    lam = LatentActionModel.from_pretrained(config.out)
    squares, clips = (open_dataset(spec) for spec in specs(root))
    noted = read_json(config.out / "config.json")["datasets"]
    assert noted[clips.fingerprint] == {"name": "own", "horizon_seconds": 0.2}
    assert noted[squares.fingerprint]["horizon_seconds"] == lam.horizon == 0.3
    undeclared = open_dataset(specs(root, "")[1])
    assert horizon_for(config.out, undeclared, lam) == 0.2, "as it was trained"
    assert horizon_for(config.out, open_dataset(specs(root, ",horizon=0.4")[1]), lam) == 0.4, "the given one"
    probe.run(ProbeConfig(lam=config.out, data=specs(root, "")[1], out=tmp_path / "probe", num_pairs=8, device="cpu"))
    assert read_json(tmp_path / "probe" / "probe.json")["horizon_seconds"] == 0.2
    good = Verdict("good", ())
    (label,) = training.suggestions(config.out, specs(root, "")[1], config.model, good, in_place=True)
    words = shlex.split(label)
    assert words[words.index("--data") + 1] == specs(root, "")[1], "quoted, for a path with a space"
    assert words[-2:] == ["--out", "LABELS"], "labels of a source in place have no folder there"
    unknown = write_synthetic_dataset(tmp_path / "other", episodes=1, frames=3, size=32)
    assert horizon_for(config.out, unknown, lam) == lam.horizon
    write_json(config.out / "config.json", {**read_json(config.out / "config.json"), "datasets": ["x"]})
    with pytest.raises(ValueError, match=r"config\.json: \"datasets\" must hold"):
        horizon_for(config.out, unknown, lam)

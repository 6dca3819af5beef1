"""Frame pairs: the horizon in seconds, no clamped pairs, splits by episode, the cache equal to decoding."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.local import LocalFileSystem
from torch.utils.data import DataLoader

from lapa.data.dataset import Dataset
from lapa.data.pairs import FramePairs, PairsConfig, collate_pairs, horizon_frames
from lapa.data.sampling import split_episodes
from lapa.data.spec import open_dataset
from lapa.data.writer import DatasetWriter
from lapa.engine.batches import StepSampler, batch_loader
from lapa.sources.synthetic import moving_squares, write_synthetic_dataset


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
    assert horizon_frames(0.01, 10) == 1


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
    with pytest.raises(ValueError, match="it is 'train'"):
        split_episodes(5, 0.1, 0, "test")


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

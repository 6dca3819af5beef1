"""Labelling by threads, processes and Ray: the same files bit for bit, and none lost or doubled by a kill."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lapa.data.episode_decoders import EpisodeDecoders
from lapa.data.spec import open_dataset
from lapa.engine.distributed import pick_device
from lapa.label import ray_engine, shards
from lapa.label.config import LabelConfig, RayConfig
from lapa.label.ray_engine import LabelActor
from lapa.label.run import choose_decoders, run
from lapa.label.shards import Labeller, Shard, make_plan
from lapa.latent.model import LatentActionModel
from lapa.presets import LATENT
from lapa.sources.synthetic import write_synthetic_dataset

EPISODES, FRAMES = 6, 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engines") / "vidéos of a square"
    write_synthetic_dataset(root, episodes=EPISODES, frames=FRAMES, size=32, fps=10)
    return root


@pytest.fixture(scope="module")
def lam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "lam"
    torch.manual_seed(0)
    LatentActionModel(replace(LATENT["debug"].model)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of two cores, for all tests of this file."""
    pytest.importorskip("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    ray.init("local", num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def options(data: Path, lam: Path, out: Path, **more: Any) -> LabelConfig:
    """Batches that end inside episodes, and shards that end with a half one."""
    given = {"batch_size": 7, "shard_episodes": 2, "embeddings": True, "min_motion": 0.02, "device": "cpu", **more}
    return LabelConfig(lam=lam, data=str(data), out=str(out), **given)


@pytest.fixture(scope="module")
def whole(data: Path, lam: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run of one thread gives."""
    out = tmp_path_factory.mktemp("engines") / "whole"
    run(options(data, lam, out, decoders=0))
    return files(out)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_decoding_in_processes_and_more_threads_change_no_bit(
    data: Path, lam: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(whole) == [*(f"episodes-{i:06d}-{i + 1:06d}.parquet" for i in (0, 2, 4)), "manifest.json"]
    monkeypatch.setattr("lapa.data.episode_decoders.WINDOW", 5)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run(options(data, lam, tmp_path / "out", decoders=2))
    finally:
        torch.set_num_threads(threads)
    assert files(tmp_path / "out") == whole


# Processes take seconds to start.
@pytest.mark.parametrize(("num", "horizon"), [(0, 1), (0, 3), (0, 9), (2, 9)])
def test_windows_hold_each_pair_once_and_the_frames_of_the_dataset(
    data: Path, num: int, horizon: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapa.data.episode_decoders.WINDOW", 4)
    dataset, pairs = open_dataset(data), []
    with EpisodeDecoders(dataset, horizon=horizon, size=32, num=num) as decoders:
        found = decoders.windows([4, 1])
        for window in found:
            last = window.first + len(window.frames_THWC)
            assert np.array_equal(window.frames_THWC, dataset.frames(window.episode, range(window.first, last)))
            pairs += [(window.episode, frame) for frame in range(window.first, last - horizon)]
        assert decoders.count([4, 1]) == 6
    assert pairs == [(episode, frame) for episode in (4, 1) for frame in range(FRAMES - horizon)]


def test_a_killed_decoder_is_reported_and_the_run_continues_from_there(
    data: Path, lam: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, write = options(data, lam, tmp_path / "out", decoders=1), shards.write_shard

    def write_and_kill(path: Path, *what: Any) -> None:
        write(path, *what)
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)

    # So that decoding is not all done when the first shard is.
    monkeypatch.setattr("lapa.data.episode_decoders.WINDOW", 2)
    monkeypatch.setattr(shards, "write_shard", write_and_kill)
    with pytest.raises(ValueError, match=r"worker process was killed.*--resume and fewer --decoders"):
        run(config)
    monkeypatch.undo()
    kept = {name: content for name, content in files(tmp_path / "out").items() if name != "run.json"}
    assert kept and kept.items() < whole.items()
    run(replace(config, resume=True, decoders=0))
    assert files(tmp_path / "out") == whole


class DyingActor(LabelActor):
    """Is killed twice: amid its first shard, with a half written file, and after the last, before it can report."""

    def _make(self, shard: Shard, labeller: Labeller) -> None:
        folder = shard.path.parent.parent
        if shard.first == 0 and not (folder / "amid").exists():
            (folder / "amid").touch()
            for _ in labeller.label([shard]):
                (shard.path.parent / f".{shard.path.stem}.{os.getpid()}.partial.parquet").write_bytes(b"PAR1")
                os.kill(os.getpid(), signal.SIGKILL)
        super()._make(shard, labeller)
        if shard.first == 4 and not (folder / "after").exists():
            (folder / "after").write_text(str(shard.path.stat().st_mtime_ns))
            os.kill(os.getpid(), signal.SIGKILL)


def test_ray_writes_the_same_files_and_a_killed_actor_loses_nothing_and_doubles_nothing(
    ray: Any,
    data: Path,
    lam: Path,
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(ray_engine, "LabelActor", DyingActor)
    run(options(data, lam, tmp_path / "out", engine="ray", ray=RayConfig(num_cpus=0.5, num_workers=1)))
    assert files(tmp_path / "out") == whole
    # Both kills happened, and what was whole before the second one was not written again.
    assert (tmp_path / "amid").exists()
    written = (tmp_path / "out" / "episodes-000004-000005.parquet").stat().st_mtime_ns
    assert (tmp_path / "after").read_text() == str(written)
    printed = capfd.readouterr()
    assert "1 workers of Ray, each with 0.5 CPU cores" in printed.err and "pairs/s" in printed.err
    assert "Execution plan" not in printed.err + printed.out


class Killed(BaseException):
    """Ends an actor as SIGKILL would, but for the test."""


@pytest.mark.parametrize("stage", ["_begin", "_make"])
def test_an_actor_counts_how_often_it_was_killed(
    data: Path, lam: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(data, lam, tmp_path / "out")
    rows = {"path": [str(tmp_path / "episodes-000002-000003.parquet")], "first": [2], "last": [3]}

    def killed(*_: object) -> None:
        raise Killed

    def new_actor() -> LabelActor:
        return LabelActor(config, make_plan(config).identity, str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(LabelActor, stage, killed)
        for _ in range(ray_engine.RETRIES):
            with pytest.raises(Killed):
                new_actor()(rows)
    monkeypatch.chdir(tmp_path)
    assert not new_actor()(rows)["error"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["episodes-000002-000003.parquet"]
    with monkeypatch.context() as patch:
        patch.setattr(LabelActor, stage, killed)
        for _ in range(ray_engine.RETRIES + 1):
            with pytest.raises(Killed):
                new_actor()(rows)
    assert "was killed 4 times" in new_actor()(rows)["error"][0]


class PoisonedActor(LabelActor):
    """Is killed by a shard each time."""

    def _make(self, shard: Shard, labeller: Labeller) -> None:
        if shard.first == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._make(shard, labeller)


@pytest.mark.slow
def test_a_shard_that_kills_its_worker_every_time_ends_the_run(
    ray: Any, data: Path, lam: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = options(data, lam, tmp_path / "out", engine="ray", ray=RayConfig(num_cpus=0.5, num_workers=1))
    with monkeypatch.context() as patch:
        patch.setattr(ray_engine, "LabelActor", PoisonedActor)
        with pytest.raises(ValueError, match=r"episodes-000002-000003.*was killed 4 times.*continue with --resume"):
            run(config)
    run(replace(config, engine="local", resume=True))
    assert files(tmp_path / "out") == whole


def test_what_ray_gives_up_on_is_one_line() -> None:
    exceptions = pytest.importorskip("ray.exceptions")

    def rows() -> Iterator[dict[str, Any]]:
        yield {"episodes": 2}
        raise exceptions.RaySystemError("in a task\n  File x\nRuntimeError: the disk is on fire\nSee the manual of Ray")

    found = ray_engine._rows(SimpleNamespace(exceptions=exceptions), SimpleNamespace(iter_rows=rows))
    assert next(found) == {"episodes": 2}
    with pytest.raises(ValueError, match=r"^Ray gave up \(RuntimeError: the disk is on fire\); .*--resume"):
        next(found)


def with_an_empty_video(data: Path, folder: Path) -> tuple[Path, str]:
    damaged = shutil.copytree(data, folder / "damaged")
    video = open_dataset(damaged).video_path(3)  # type: ignore[attr-defined]
    video.write_bytes(b"")
    return damaged, video.name


def test_an_actor_returns_its_error(data: Path, lam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    damaged, video = with_an_empty_video(data, tmp_path)
    config, identity = (
        options(damaged, lam, tmp_path / "out"),
        make_plan(options(damaged, lam, tmp_path / "out")).identity,
    )
    rows = {"path": [str(tmp_path / "episodes-000002-000003.parquet")], "first": [2], "last": [3]}
    error = LabelActor(config, identity, str(tmp_path))(rows)["error"][0]
    assert video in error and "--skip-bad to leave the episode out" in error and "--resume" in error
    error = LabelActor(config, {**identity, "dataset_fingerprint": "of another"}, str(tmp_path))(rows)["error"][0]
    assert "has another model or dataset under these names: dataset_fingerprint was 'of another'" in error
    error = LabelActor(replace(config, data="nowhere"), identity, str(tmp_path))(rows)["error"][0]
    assert error.startswith("a worker could not begin: nowhere: no such")


@pytest.mark.slow
def test_errors_with_ray_are_those_of_this_machine(ray: Any, data: Path, lam: Path, tmp_path: Path) -> None:
    damaged, video = with_an_empty_video(data, tmp_path)
    config = options(damaged, lam, tmp_path / "out", engine="ray", ray=RayConfig(num_cpus=0.5, num_workers=1))
    with pytest.raises(ValueError, match=rf"{video}.*--skip-bad to leave the episode out"):
        run(config)
    run(replace(config, resume=True, skip_bad=True))
    run(options(damaged, lam, tmp_path / "here", skip_bad=True))
    assert files(tmp_path / "out") == files(tmp_path / "here")


def test_ray_is_not_needed_unless_asked_for(
    data: Path, lam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'pip install "lapa-vla\[ray\]"'):
        run(options(data, lam, tmp_path / "out", engine="ray"))
    run(options(data, lam, tmp_path / "out", resume=True))


def test_workers_that_do_not_fit_the_cluster_are_refused(data: Path, lam: Path, tmp_path: Path) -> None:
    config = options(data, lam, tmp_path / "out", engine="ray", device="auto")
    pool = ray_engine._pool
    assert pool(replace(config, ray=RayConfig(num_cpus=0.5)), {"CPU": 2.0}, num_shards=9) == (4, 0.5, 0.0)
    assert pool(config, {"CPU": 16.0, "GPU": 2.0}, num_shards=9) == (2, 1.0, 1.0)
    assert pool(replace(config, ray=RayConfig(num_gpus=0.25)), {"CPU": 16.0, "GPU": 2.0}, num_shards=5) == (
        5,
        1.0,
        0.25,
    )
    assert pool(replace(config, device="cpu"), {"CPU": 16.0, "GPU": 2.0}, num_shards=3) == (3, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"3 workers of 1 CPUs each do not fit a cluster that has 2; give fewer"):
        pool(replace(config, ray=RayConfig(num_workers=3)), {"CPU": 2.0}, num_shards=9)
    for given, has, message in (
        ({"device": "cuda"}, {"CPU": 2.0}, r"1 workers of 1 GPUs each .* has 0; give --device cpu"),
        (
            {"device": "cpu", "ray": RayConfig(num_gpus=1.0)},
            {"CPU": 2.0, "GPU": 1.0},
            "--device cpu and --ray.num-gpus 1 contradict",
        ),
        (
            {"device": "cuda", "ray": RayConfig(num_gpus=0.0)},
            {"CPU": 2.0, "GPU": 1.0},
            "--device cuda and --ray.num-gpus 0 contradict",
        ),
        ({"device": "gpu"}, {"CPU": 2.0}, "unknown device 'gpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            pool(replace(config, **given), has, num_shards=1)
    with pytest.raises(ValueError, match="memory of this process"):
        run(replace(config, out="memory://labels"))


def test_processes_decode_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    cpu, gpu = pick_device("cpu"), torch.device("cuda", 0)
    assert [choose_decoders(None, device, 10**6) for device in (cpu, gpu)] == [3, 11]
    assert choose_decoders(None, gpu, 100) == 0 and choose_decoders(5, cpu, 100) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_decoders(None, gpu, 10**6) == 2


@pytest.mark.slow
def test_processes_of_torchrun_share_the_shards_out(
    data: Path, lam: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lapa", "label"]
    given = ["--lam", lam, "--data", data, "--out", tmp_path / "out", "--batch-size", 7, "--shard-episodes", 2]
    more = ["--embeddings", "--min-motion", 0.02, "--device", "cpu"]
    subprocess.run([*command, *map(str, [*given, *more])], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert files(tmp_path / "out") == whole

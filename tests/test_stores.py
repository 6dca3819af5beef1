"""Datasets written to an S3 server: the bytes of a local disk, after faults and kills; one writer; no permission."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from lapa import stores
from lapa.data import convert_ray, writer
from lapa.data.config import MergeConfig
from lapa.data.convert import run
from lapa.data.convert_ray import ShardActor
from lapa.data.merge import run as merge
from lapa.data.metadata import JOURNAL_PARTS
from lapa.data.source import Item
from lapa.data.spec import open_dataset
from lapa.data.writer import DatasetWriter
from lapa.files import as_path, read_json
from lapa.locks import LOCK
from lapa.ray_cluster import RayConfig
from lapa.sources.webdataset import WebDatasetConfig
from s3_server import Fault, Faults, s3_server
from test_convert_ray import DyingActor, Killed, clips, options, stand_in, whole  # noqa: F401
from test_data_merge import files
from test_sources_videos import write_clip
from test_sources_webdataset import write_shard


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_ray, "SHARD_ITEMS", 2)
    monkeypatch.setattr(writer, "LINES_PER_PART", 2)
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    monkeypatch.setattr(stores, "STALE", 0.2)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    with s3_server(monkeypatch) as faults:
        yield faults


@pytest.fixture
def bucket(server: Faults) -> str:
    name = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(name)
    return name


def objects(folder: str) -> dict[str, bytes]:
    """All objects of a folder in a bucket, by their names in it."""
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    return {name.removeprefix(f"{folder}/"): store.cat_file(name) for name in store.find(folder)}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_store_holds_what_a_disk_holds(clips: Path, whole: dict[str, bytes], bucket: str, engine: str) -> None:  # noqa: F811
    run(options(clips, f"s3://{bucket}/out", engine=engine, workers=0 if engine == "ray" else 1))
    assert objects(f"{bucket}/out") == whole
    run(options(clips, f"s3://{bucket}/out", resume=True, workers=1))
    with pytest.raises(ValueError, match="already holds a finished result"):
        run(options(clips, f"s3://{bucket}/out", workers=1))
    assert objects(f"{bucket}/out") == whole


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("engine", "function", "place", "then"),
    [
        ("local", "_write_record", 4, "ray"),
        ("ray", "_write_record", 3, "local"),
        ("ray", "flush", 4, "ray"),
        ("ray", "_remove_journal", 1, "ray"),
    ],
)
def test_a_killed_command_loses_and_doubles_nothing_on_a_store(
    clips: Path,  # noqa: F811
    whole: dict[str, bytes],  # noqa: F811
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    function: str,
    place: int,
    then: str,
) -> None:
    calls = []

    def dying(writer: DatasetWriter, *arguments: Any) -> Any:
        if "s3:" in str(writer.root):
            calls.append(arguments)
            if len(calls) == place:
                raise Killed
        return original(writer, *arguments)

    original = getattr(DatasetWriter, function)
    out = f"s3://{bucket}/out"
    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, function, dying)
        with pytest.raises(Killed):
            run(options(clips, out, engine=engine, workers=int(engine == "local")))
    # What a killed process leaves, and an exception does not.
    fsspec.filesystem("s3").pipe_file(f"{bucket}/out/{LOCK}", b'{"owner": "gone", "writer": "process 1 on moon"}')
    run(options(clips, out, engine=then, resume=True, workers=int(then == "local")))
    assert objects(f"{bucket}/out") == whole


@pytest.mark.usefixtures("stand_in")
def test_a_shard_that_lacks_a_video_is_made_again(
    clips: Path,  # noqa: F811
    whole: dict[str, bytes],  # noqa: F811
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(actor: ShardActor, marker: Any, items: Sequence[Item]) -> None:
        original(actor, marker, items)
        if marker.stem == "000000002":
            store = fsspec.filesystem("s3")
            folder = (marker.parent / read_json(marker)["folder"]).path
            store.rm_file(next(name for name in store.find(folder) if name.endswith("file-001.mp4")))

    original, out = ShardActor._make, f"s3://{bucket}/out"
    with monkeypatch.context() as patch:
        patch.setattr(ShardActor, "_make", lost)
        with pytest.raises(ValueError, match=r"000000002\.json: lacks .*file-001\.mp4'; --resume makes it again"):
            run(options(clips, out, engine="ray"))
    run(options(clips, out, engine="ray", resume=True))
    assert objects(f"{bucket}/out") == whole


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("kinds", [("500", "cut after", "503"), ("cut before", "slow"), ("half", "half")])
def test_faults_that_pass_are_waited_for(
    clips: Path,  # noqa: F811
    whole: dict[str, bytes],  # noqa: F811
    server: Faults,
    bucket: str,
    kinds: tuple[Fault, ...],
) -> None:
    written = ("PUT .*mp4", f"PUT .*{JOURNAL_PARTS}", "PUT .*parquet", "PUT .*json$", f"PUT .*{LOCK}")
    requests = ("GET .*(json|mp4|parquet)$",) if "half" in kinds else written
    server.faults += [(request, kind, 1) for request in requests for kind in kinds]
    run(options(clips, f"s3://{bucket}/out", workers=1))
    assert not any(times for *_, times in server.faults)
    assert objects(f"{bucket}/out") == whole


def test_a_fault_that_stays_is_one_line_and_resume_goes_on(
    clips: Path,  # noqa: F811
    whole: dict[str, bytes],  # noqa: F811
    server: Faults,
    bucket: str,
) -> None:
    server.faults.append(("PUT .*file-003.mp4", "500", 1000))
    with pytest.raises(
        ValueError, match=rf"^s3://{bucket}/out/videos/.*/file-003\.mp4: could not be written in 4 attem"
    ) as e:
        run(options(clips, f"s3://{bucket}/out", workers=1))
    assert "\n" not in str(e.value) and "InternalError for a test" in str(e.value) and "--resume" in str(e.value)
    server.faults.clear()
    run(options(clips, f"s3://{bucket}/out", workers=1, resume=True))
    assert objects(f"{bucket}/out") == whole


def test_who_may_not_write_and_where_nothing_is(clips: Path, server: Faults, bucket: str) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=r"^s3://no-bucket/out/\.lock: .* does not exist .*; make the bucket, or corr"):
        run(options(clips, "s3://no-bucket/out", workers=1))
    server.faults.append((f"PUT /{bucket}/out/.lock", "403", 1))
    with pytest.raises(ValueError, match=rf"^s3://{bucket}/out/\.lock: no permission, .*; log in to the store, or ask"):
        run(options(clips, f"s3://{bucket}/out", workers=1))
    server.faults[:] = [(f"[A-Z]* /{bucket}", "403", 1000)]
    with pytest.raises(ValueError, match=rf"^s3://{bucket}/out.*: no permission"):
        run(options(clips, f"s3://{bucket}/out", workers=1))
    server.faults.clear()
    assert objects(bucket) == {}


def test_one_command_at_a_time_writes(
    clips: Path,  # noqa: F811
    whole: dict[str, bytes],  # noqa: F811
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = f"s3://{bucket}/out"
    with monkeypatch.context() as patch:
        # An owner whose clock is far ahead, and who writes the lock often enough for any wait.
        patch.setattr(stores, "who", lambda: "process 7 on moon (lapa data), started 2099-01-01")
        patch.setattr(stores, "BEAT", 0.01)
        patch.setattr(stores, "STALE", 60.0)
        lock = stores.locked_store(as_path(out), take_over=False)
        with ThreadPoolExecutor(1) as owner, ExitStack() as ending:
            # The thread that holds a lock may take it again.
            owner.submit(lock.__enter__).result()
            ending.callback(lambda: owner.submit(lock.__exit__, None, None, None).result())
            with pytest.raises(ValueError, match=r"is being written by process 7 on moon .*2099.*over with --resume"):
                run(options(clips, out, workers=1))
            with pytest.raises(
                ValueError, match=r"is being written by process 7 on moon .*2099.*; wait for it to end, or gi"
            ):
                run(options(clips, out, workers=1, resume=True))
    assert objects(f"{bucket}/out") == {}
    fsspec.filesystem("s3").pipe_file(f"{bucket}/out/{LOCK}", b"damaged")
    run(options(clips, out, workers=1, resume=True))
    assert objects(f"{bucket}/out") == whole


def test_of_two_writers_the_second_stops(bucket: str) -> None:
    """Where the lock has failed: an owner who slept and was taken for dead."""
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="another command has written this dataset meanwhile"):
        for number in range(2):
            one = DatasetWriter(f"s3://{bucket}/out", fps=5, cameras={"front": (32, 32)}, resume=True)
            other = DatasetWriter(f"s3://{bucket}/out", fps=5, cameras={"front": (32, 32)}, resume=True)
            one.add_episode({"front": images}, f"lift {number}", source="a")
            one.flush()
            other.add_episode({"front": images}, f"push {number}", source="a")
            other.flush()


def test_a_journal_with_a_gap_goes_on_before_it(bucket: str) -> None:
    """As after an --overwrite that was killed while it removed the parts."""
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)

    def opened() -> DatasetWriter:
        return DatasetWriter(f"s3://{bucket}/out", fps=5, cameras={"front": (32, 32)}, resume=True)

    for number in range(3):
        one = opened()
        one.add_episode({"front": images}, f"lift {number}", source=str(number))
        one.flush()
    fsspec.filesystem("s3").rm_file(f"{bucket}/out/{JOURNAL_PARTS}/{1:09d}.jsonl")
    for number in range(3):
        one = opened()
        assert one.num_episodes == number
        one.add_episode({"front": images}, f"lift {number}", source=str(number))
        one.flush()
    assert len(one.finish()) == 3


def test_episodes_that_a_killed_script_added_are_there(bucket: str) -> None:
    """Also where it names no items, after which `lapa data` writes their lines."""
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
    for given in ({}, {"resume": True}):
        one = DatasetWriter(f"s3://{bucket}/out", fps=5, cameras={"front": (32, 32)}, **given)
        assert one.num_episodes == 2 * bool(given)
        for number in range(one.num_episodes, 3):
            one.add_episode({"front": images}, f"lift {number}", source=str(number))
    assert len(one.finish()) == 3


def test_uploads_leave_a_connection_for_the_lock() -> None:
    """On a slow line it would otherwise wait for them, and its owner be taken for dead."""
    assert writer.REQUESTS < pytest.importorskip("botocore.httpsession").MAX_POOL_CONNECTIONS


def test_the_owner_of_a_lock_does_not_remove_that_of_another(bucket: str) -> None:
    folder = as_path(f"s3://{bucket}/out")
    with stores.locked_store(folder, take_over=False):
        (folder / LOCK).write_bytes(b'{"owner": "another"}')
    assert json.loads((folder / LOCK).read_bytes()) == {"owner": "another"}


def test_a_shard_that_changes_while_it_is_read_is_counted(
    server: Faults, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("LAPA_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("s3")
    write_clip(tmp_path / "clip.mp4", num=8)
    clip = (tmp_path / "clip.mp4").read_bytes()
    shards = [write_shard(tmp_path / f"{name}.tar", {"1.mp4": clip}).read_bytes() for name in "ab"]
    for number, shard in enumerate(shards):
        store.pipe_file(f"{bucket}/in/{number}.tar", shard)
    changed = write_shard(tmp_path / "new.tar", {"2.mp4": clip}).read_bytes()
    assert len(changed) == len(shards[1])

    def change(request: str) -> None:
        # Both shards are listed, and the first one is converted.
        if f"PUT /{bucket}/out/videos" in request:
            server.hooks.clear()
            as_path(
                f"s3://{bucket}/in/1.tar",
            ).fs.pipe_file(f"{bucket}/in/1.tar", changed)

    monkeypatch.setattr(writer, "LINES_PER_PART", 1)
    given = {"size": 32, "workers": 1, "caption": "wait"}
    server.hooks.append(change)
    with pytest.raises(ValueError, match=r"in/1\.tar: .*(has changed|expired|changed)"):
        run(WebDatasetConfig(f"s3://{bucket}/in", out=f"s3://{bucket}/out", **given))
    store.pipe_file(f"{bucket}/in/1.tar", shards[1])
    server.hooks.append(change)
    run(WebDatasetConfig(f"s3://{bucket}/in", out=f"s3://{bucket}/out", overwrite=True, skip_bad=True, **given))
    assert len(open_dataset(f"s3://{bucket}/out")) == 1
    assert "left out, damaged: 1" in capsys.readouterr().err


@pytest.mark.parametrize("places", ["ssd", "sds", "dss", "sss"])
def test_merging_on_stores(bucket: str, server: Faults, tmp_path: Path, places: str) -> None:
    roots = [
        f"s3://{bucket}/{name}" if place == "s" else str(tmp_path / name)
        for name, place in zip("abo", places, strict=True)
    ]
    for root in (*roots[:2], str(tmp_path / "a-here"), str(tmp_path / "b-here")):
        written = DatasetWriter(root, fps=5, cameras={"front": (32, 32)}, action_names=["x"])
        for number in range(2 + ("b" in root.rpartition("/")[2][0])):
            images = np.random.default_rng(number).integers(0, 255, (3, 32, 32, 3), np.uint8)
            written.add_episode(
                {"front": images}, f"lift {number}", actions=np.full((3, 1), number), source=str(number)
            )
        written.finish()
    merge(MergeConfig((str(tmp_path / "a-here"), str(tmp_path / "b-here")), str(tmp_path / "whole")))
    server.seen.clear()
    merge(MergeConfig(tuple(roots[:2]), roots[2]))
    if places == "sss":
        assert not [request for request in server.seen if request.startswith("GET") and request.endswith(".mp4")]
    found = objects(f"{bucket}/o") if places[2] == "s" else files(tmp_path / "o")
    assert found == files(tmp_path / "whole")


@pytest.mark.slow
def test_commands_that_are_killed_go_on(clips: Path, whole: dict[str, bytes], bucket: str, tmp_path: Path) -> None:  # noqa: F811
    given = options(clips, f"s3://{bucket}/out")
    command = [sys.executable, "-m", "lapa", "data", "videos", str(clips), "--out", str(given.out), "--fps", "10"]
    command += ["--caption", "wait", "--size", "32", "--min-seconds", "0.5", "--skip-bad", "--workers", "1"]
    code = "from lapa import cli, stores; from lapa.data import writer; stores.STALE = writer.LINES_PER_PART = 1; "
    code += "cli.main()"
    command[1:3] = ["-c", code]
    store = fsspec.filesystem("s3")
    for num_parts in (2, 4, 6):
        process = subprocess.Popen([*command, *["--resume"] * (num_parts > 2)], env=os.environ)
        while process.poll() is None:
            store.invalidate_cache()
            if (
                store.exists(f"{bucket}/out/{JOURNAL_PARTS}")
                and len(store.ls(f"{bucket}/out/{JOURNAL_PARTS}")) >= num_parts
            ):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        process.wait()
    subprocess.run([*command, "--resume"], check=True, env=os.environ)
    assert objects(f"{bucket}/out") == whole


@pytest.mark.slow
def test_ray_itself_writes_to_a_store(
    clips: Path,  # noqa: F811
    whole: dict[str, bytes],  # noqa: F811
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[DyingActor.__module__])
    monkeypatch.setattr(convert_ray, "ShardActor", DyingActor)
    monkeypatch.chdir(tmp_path)
    run(options(clips, f"s3://{bucket}/out", engine="ray", ray=RayConfig(num_cpus=0.5, num_workers=1)))
    assert (tmp_path / "amid").exists() and (tmp_path / "after").exists()
    assert objects(f"{bucket}/out") == whole

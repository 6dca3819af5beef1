"""Shards read from an S3 server: what is fetched, faults that pass and that stay, no permission, versions."""

from __future__ import annotations

import shutil
import socket
import struct
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lapa import store_cache, stores
from lapa.data import convert_ray
from lapa.data.convert import run
from lapa.data.dataset import Dataset
from lapa.data.episode_decoders import EpisodeDecoders
from lapa.data.lerobot import LeRobotDataset
from lapa.data.spec import open_dataset
from lapa.data.video import encode_clip
from lapa.errors import StoreError
from lapa.files import as_path, open_binary
from lapa.sources import webdataset
from lapa.sources.synthetic import write_synthetic_dataset
from lapa.sources.webdataset import WebDatasetConfig, WebDatasetReading, find_shards
from lapa.store_cache import version_of
from s3_server import Fault, Faults, s3_server
from test_convert_ray import stand_in  # noqa: F401
from test_data_merge import files
from test_sources_videos import write_clip
from test_sources_webdataset import write_shard

STAYS = 10**6


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stores, "PAUSE", 0.001)
    monkeypatch.setattr(convert_ray, "SHARD_ITEMS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store_cache._versions.clear()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    with s3_server(monkeypatch) as faults:
        yield faults


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of tar, one of parquet, of two clips each, on this machine."""
    folder = tmp_path_factory.mktemp("here") / "in"
    clips = []
    for number in range(6):
        write_clip(folder / "clip.mp4", num=6 + number)
        clips.append((folder / "clip.mp4").read_bytes())
    (folder / "clip.mp4").unlink()
    write_shard(folder / "0.tar", {"a.mp4": clips[0], "b.mp4": clips[1]})
    write_shard(folder / "1.tar", {"a.mp4": clips[2], "b.mp4": clips[3]})
    pq.write_table(pa.table({"video": clips[4:], "text": ["e", "f"]}), folder / "2.parquet", row_group_size=1)
    return folder


@pytest.fixture
def bucket(server: Faults, here: Path) -> str:
    name = f"bucket-{uuid.uuid4().hex}"
    store = fsspec.filesystem("s3")
    store.mkdir(name)
    for path in here.iterdir():
        store.pipe_file(f"{name}/in/{path.name}", path.read_bytes())
    store.invalidate_cache()
    server.seen.clear()
    return name


def convert(shards: str, out: Path, **settings: object) -> Dataset:
    given = {"size": 32, "workers": 1, "caption": "wait", **settings}
    run(WebDatasetConfig(shards, out=out, **given))  # type: ignore[arg-type]
    return open_dataset(out)


def same(one: Dataset, other: Dataset) -> None:
    assert [episode.source for episode in one] == [episode.source for episode in other]
    assert all(np.array_equal(one.frames(number), other.frames(number)) for number in range(len(one)))


@pytest.mark.parametrize("size", [300_000, 3_000_000])
def test_a_clip_is_fetched_and_little_more(server: Faults, bucket: str, here: Path, tmp_path: Path, size: int) -> None:
    write_clip(tmp_path / "clip.mp4", num=8)
    clip = (tmp_path / "clip.mp4").read_bytes()
    # A box that says nothing.
    clip += struct.pack(">I4s", size, b"free") + bytes(size - 8)
    shard = write_shard(tmp_path / "a.tar", {f"{number:02d}.mp4": clip for number in range(10)}).read_bytes()
    as_path(f"s3://{bucket}/big/a.tar").write_bytes(shard)
    server.sent.clear()
    source = WebDatasetReading(f"s3://{bucket}/big/a.tar").open()
    server.sent.clear()
    for item in source.items:
        assert len(list(source.read(item).frames["video"])) == 8
    assert server.sent[f"GET /{bucket}/big/a.tar"] < 1.2 * len(shard)


def test_a_header_is_fetched_without_the_film_behind_it(server: Faults, bucket: str) -> None:
    as_path(f"s3://{bucket}/big").joinpath("a.bin").write_bytes(bytes(8 << 20))
    server.sent.clear()
    with open_binary(as_path(f"s3://{bucket}/big/a.bin")) as file:
        file.read(10)
    assert server.sent[f"GET /{bucket}/big/a.bin"] < 2 * stores.READ_AHEAD


@pytest.mark.parametrize("kinds", [("500", "503", "cut after"), ("cut before", "slow"), ("half", "half")])
def test_faults_that_pass_are_waited_for(
    server: Faults, bucket: str, here: Path, tmp_path: Path, kinds: tuple[Fault, ...]
) -> None:
    def spoil(names: str, *requests: str) -> None:
        assert not any(times for *_, times in server.faults)
        requests = (*requests, *(f"{verb} /{bucket}/in/{name}" for verb in ("GET", "HEAD") for name in names))
        server.faults[:] = [(request, kind, 1) for request in requests for kind in kinds]

    spoil("01")
    same(open_dataset(f"webdataset:s3://{bucket}/in/{{0..1}}.tar"), open_dataset(f"webdataset:{here}/{{0..1}}.tar"))
    spoil("012", f"GET /{bucket}/?$")
    same(open_dataset(f"webdataset:s3://{bucket}/in"), open_dataset(f"webdataset:{here}"))
    spoil("012")
    same(convert(f"s3://{bucket}/in", tmp_path / "out"), convert(str(here), tmp_path / "whole"))
    spoil("")


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        ("HEAD", "500", r"could not be read in 4 attempts .*; check the connection.*with --resume"),
        ("GET", "500", r"could not be read in 4 attempts .*; check the connection.*with --resume"),
        ("HEAD", "403", r"no permission.*; log in to the store.*--resume"),
        ("GET", "403", r"no permission.*; log in to the store.*--resume"),
    ],
)
def test_an_outage_is_no_damage(
    server: Faults,
    bucket: str,
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    engine: str,
    request_: str,
    kind: Fault,
    message: str,
) -> None:
    shards, out = f"s3://{bucket}/in", tmp_path / "out"
    given = {"skip_bad": True, "engine": engine, "workers": int(engine == "local")}
    fault = (f"{request_} /{bucket}/in/1.tar", kind, STAYS)
    # Until the store is given up: what asks it after that finds nothing wrong.
    server.faults.append((*fault[:2], stores.ATTEMPTS if kind == "500" else 1))
    with pytest.raises(StoreError, match=rf"^{shards}/1\.tar: {message}$"):
        convert(shards, out, **given)
    # Nothing is remembered of a shard that could not be asked for.
    assert len(list((tmp_path / "cache").rglob("*.json"))) <= 2

    def begin(message: str) -> None:
        if "items in" in message:
            server.faults.append(fault)

    server.faults.clear()
    with pytest.MonkeyPatch.context() as patch:
        # All is listed, and nothing is converted.
        patch.setattr("lapa.data.convert.say", begin)
        with pytest.raises(ValueError, match=rf"^{shards}/1\.tar: {message}$"):
            convert(shards, out, **given)
    server.faults.clear()
    convert(shards, out, **given, resume=True)
    shown = capsys.readouterr().err
    assert "damaged" not in shown and "a worker" not in shown
    shutil.copytree(here, tmp_path / "local" / "in")
    convert(str(tmp_path / "local" / "in"), tmp_path / "whole", skip_bad=True)
    assert files(out) == files(tmp_path / "whole")


def test_an_outage_while_lengths_are_read_is_no_damage(
    server: Faults, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def then(*arguments: Any) -> Any:
        server.faults.append((f"GET /{bucket}/in/1.tar", "500", STAYS))
        return original(*arguments)

    original = webdataset.common_format
    monkeypatch.setattr(webdataset, "common_format", then)
    with pytest.raises(StoreError, match=r"1\.tar: could not be read in 4 attempts"):
        open_dataset(f"webdataset:s3://{bucket}/in,skip_bad=true")


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_store_that_fails_amid_a_film(
    server: Faults, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(webdataset, "READ_AHEAD", 1)
    noise = np.random.default_rng(0).integers(0, 255, (30, 128, 128, 3), np.uint8)
    encode_clip(tmp_path / "clip.mp4", noise, 10)
    shard = write_shard(tmp_path / "a.tar", {"a.mp4": (tmp_path / "clip.mp4").read_bytes()})
    as_path(f"s3://{bucket}/big/a.tar").write_bytes(shard.read_bytes())
    source = WebDatasetReading(f"s3://{bucket}/big/a.tar").open()
    server.seen.clear()
    whole = [frame for _, frame in source.read(source.items[0]).frames["video"]]
    requests = [number for number, request in enumerate(server.seen) if request.startswith("GET")]
    assert len(whole) == 30 and len(requests) > 8

    def fault(times: int) -> Callable[[str], None]:
        def begin(request: str) -> None:
            if len(server.seen) == requests[len(requests) * place // 4] + 1:
                server.faults.append((f"GET /{bucket}/big", "500", times))

        return begin

    for times in (1, STAYS):
        server.seen.clear()
        server.hooks[:] = [fault(times)]
        clip = source.read(source.items[0])
        if times == STAYS:
            with pytest.raises(StoreError, match=r"big/a\.tar: could not be read in 4 attempts"):
                list(clip.frames["video"])
        else:
            found = [frame for _, frame in clip.frames["video"]]
            assert np.array_equal(found, whole) and clip.lost == 0
        assert server.faults


def test_who_may_not_read(server: Faults, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server.faults.append((f"[A-Z]+ /{bucket}", "403", STAYS))
    for shards in (f"s3://{bucket}", f"s3://{bucket}/in", f"s3://{bucket}/in/0.tar"):
        with pytest.raises(StoreError, match=rf"^{shards}/?: no permission, .*; log in to the store, or ask its owner"):
            find_shards(shards)
    with pytest.raises(StoreError, match=rf"^s3://{bucket}/in/0\.tar: no permission"):
        open_dataset(f"webdataset:s3://{bucket}/in/{{0..1}}.tar,skip_bad=true")
    # Whoever may read the objects need not be allowed to list them.
    server.faults[:] = [(f"[A-Z]+ /{bucket}/?$", "403", STAYS), ("in/[{]", "403", STAYS)]
    assert len(open_dataset(f"webdataset:s3://{bucket}/in/{{0..1}}.tar")) == 4


def test_a_store_that_is_not_there(server: Faults, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    for shards in ("in", "in/0.tar", "in/{0..1}.tar"):
        with pytest.raises(StoreError, match=rf"^s3://{bucket}/in.*: could not be read in 4 attempts .*127\.0\.0\.1"):
            open_dataset(f"webdataset:s3://{bucket}/{shards},skip_bad=true")


def test_shards_are_asked_for_at_once(server: Faults, bucket: str) -> None:
    both = threading.Barrier(2, timeout=60)

    def wait(request: str) -> None:
        if request.startswith("HEAD") and request.endswith(".tar") and not both.broken:
            both.wait()
            server.hooks.clear()

    server.hooks.append(wait)
    open_dataset(f"webdataset:s3://{bucket}/in/{{0..1}}.tar")
    assert not server.hooks and not both.broken


def test_a_replaced_object_is_known_although_it_was_listed(bucket: str) -> None:
    path = as_path(f"s3://{bucket}/in/0.tar")
    path.fs.ls(f"{bucket}/in")
    before, (_, state) = version_of(path), (path, webdataset.file_state(path))
    fsspec.filesystem("s3", skip_instance_cache=True).pipe_file(f"{bucket}/in/0.tar", b"another")
    assert version_of(path) == before
    assert webdataset.file_state(path) != state
    assert version_of(path)[0] == len(b"another")


def test_a_shard_that_is_replaced_while_it_is_open(bucket: str) -> None:
    path = as_path(f"s3://{bucket}/in/0.tar")
    with stores.opened(path, 1) as file:
        file.read(1)
        path.fs.pipe_file(path.path, path.read_bytes()[::-1])
        with pytest.raises(ValueError, match=r"in/0\.tar: has changed while it was read; run the command again"):
            file.read()


def test_large_row_groups_are_converted_and_not_read_in_place(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset, "LARGEST_GROUP", 1000)
    with pytest.raises(ValueError, match=r"2\.parquet: has a row group of 0 MiB, .*; convert it \(`lapa data webdat"):
        open_dataset(f"webdataset:{here / '2.parquet'}")
    assert len(convert(str(here / "2.parquet"), tmp_path / "out")) == 2
    assert len(open_dataset(f"webdataset:{here / '0.tar'}")) == 2


def test_no_episode_is_left_out_for_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_synthetic_dataset(tmp_path / "ds", 3, frames=8, size=32).root
    assert len(open_dataset(f"lerobot:{root},skip_bad=true")) == 3

    def fail(dataset: Dataset, episode: int, camera: str) -> None:
        if episode == 1:
            raise StoreError("s3://a: could not be read")

    monkeypatch.setattr(LeRobotDataset, "_film", fail)
    with pytest.raises(StoreError):
        open_dataset(f"lerobot:{root},skip_bad=true")


def test_labels_have_no_gap_for_an_outage(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(f"webdataset:{here}")

    def fail(*_: object) -> None:
        raise StoreError("s3://a: could not be read")

    monkeypatch.setattr(type(dataset), "frames", fail)
    with EpisodeDecoders(dataset, horizon=1, size=32) as decoders, pytest.raises(StoreError):
        list(decoders.windows([0]))

"""The cache of stores on a local disk: same bytes, its bound, processes that share it, kills, stores that fail."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from upath import UPath

from lapa import store_cache, stores
from lapa.data.pairs import FramePairs, PairsConfig, collate_pairs
from lapa.data.spec import open_dataset
from lapa.engine.batches import AHEAD, Draw, ReadAhead, StepSampler, batch_loader
from lapa.errors import StoreError, UserError
from lapa.files import open_binary
from lapa.sources.synthetic import write_synthetic_dataset
from lapa.store_cache import BLOCK, StoreCache, use_store_cache
from lapa.types import TrainingDataset

pytestmark = pytest.mark.filterwarnings("ignore:UPath 'counted' filesystem")
GIB = 2**30


class CountedStore(LocalFileSystem):
    """This machine's files as a store: counts requests, may be slow or fail a number of times."""

    protocol = "counted"
    requests: ClassVar[Counter[str]] = Counter()
    failures: ClassVar[list[OSError]] = []
    delay = 0.0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("counted://"))

    def info(self, path: str, **options: object) -> dict:
        self.requests["info"] += 1
        return super().info(path, **options)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        self.requests["read"] += 1
        time.sleep(self.delay)
        if self.failures:
            raise self.failures.pop()
        return super().cat_file(path, start, end, **options)


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fsspec.register_implementation("counted", CountedStore, clobber=True)
    CountedStore.requests.clear()
    store_cache._versions.clear()
    monkeypatch.setattr(stores, "PAUSE", 0.001)
    yield
    use_store_cache(None, 1)


def an_object(folder: Path, size: int, name: str = "object") -> tuple[UPath, bytes]:
    content = np.random.default_rng(size).bytes(size)
    (folder / name).write_bytes(content)
    return UPath(f"counted://{folder / name}"), content


def blocks(cache: StoreCache) -> list[Path]:
    return sorted(path for path in cache.folder.glob("*/*") if path.suffix != ".part")


def test_an_object_is_fetched_once_and_reads_as_it_is(tmp_path: Path) -> None:
    path, content = an_object(tmp_path, 2 * BLOCK + 1000)
    cache = StoreCache(tmp_path / "cache", 1)
    for _ in range(2):
        with cache.open(path) as file:
            assert file.read(10) == content[:10]
            assert file.seek(-1500, os.SEEK_END) == len(content) - 1500
            assert file.read() == content[-1500:]
            assert file.read(1) == b""
            file.seek(BLOCK - 5)
            assert file.read(10) == content[BLOCK - 5 : BLOCK + 5]
    assert CountedStore.requests == {"info": 1, "read": 3}
    assert cache.num_bytes() == len(content)
    use_store_cache(tmp_path / "cache", 1)
    with open_binary(path) as file:
        assert file.read() == content
    assert CountedStore.requests["read"] == 3


def test_the_bound_holds_and_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = StoreCache(tmp_path / "cache", 4 * BLOCK / GIB)
    objects = [an_object(tmp_path, BLOCK, f"{number}") for number in range(5)]
    for number in (0, 1, 2):
        cache.open(objects[number][0]).read()
    for number, block in enumerate(blocks(cache)):
        os.utime(block, (number, number))
    kept_open = {block: block.open("rb") for block in blocks(cache)}
    oldest, second, third = blocks(cache)
    for number in (3, 4):
        cache.open(objects[number][0]).read()
        assert cache.num_bytes() <= cache.limit
    assert not oldest.exists() and not second.exists() and third.exists()
    # A process that reads a block keeps it.
    assert len(kept_open[oldest].read()) == BLOCK
    for path, content in objects:
        assert cache.open(path).read() == content
        assert cache.num_bytes() <= cache.limit
    for file in kept_open.values():
        file.close()


def test_a_changed_object_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, old = an_object(tmp_path, 1000)
    cache = StoreCache(tmp_path / "cache", 1)
    assert cache.open(path).read() == old
    (tmp_path / "object").write_bytes(old[::-1])
    os.utime(tmp_path / "object", (1, 1))
    monkeypatch.setattr(store_cache, "FRESH", -1.0)
    assert cache.open(path).read() == old[::-1]


def test_an_object_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    path, content = an_object(tmp_path, 1000)
    file = StoreCache(tmp_path / "cache", 1).open(path)
    (tmp_path / "object").write_bytes(content[:10])
    with pytest.raises(StoreError, match=r"object: could not be read in 4 attempts \(10 bytes in place"):
        file.read()


def test_a_store_that_fails_is_asked_again_but_not_for_what_it_refuses(tmp_path: Path) -> None:
    path, content = an_object(tmp_path, 1000)
    cache = StoreCache(tmp_path / "cache", 1)
    CountedStore.failures = [OSError("500"), ConnectionResetError("cut"), TimeoutError("slow")]
    assert cache.open(path).read() == content
    assert CountedStore.requests["read"] == 4
    other, _ = an_object(tmp_path, 1001, "other")
    CountedStore.failures = [PermissionError("403")]
    with pytest.raises(StoreError, match=r"other: no permission, it could not be read \(403\)"):
        cache.open(other).read()
    assert CountedStore.requests["read"] == 5
    CountedStore.failures = [OSError("500")] * stores.ATTEMPTS
    with pytest.raises(StoreError, match=r"other: could not be read in 4 attempts \(500\)"):
        cache.open(other).read()
    assert not CountedStore.failures


@pytest.mark.parametrize("at_once", [True, False])
def test_a_full_disk_reads_on_without_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, at_once: bool
) -> None:
    path, content = an_object(tmp_path, 1000)
    cache = StoreCache(tmp_path / "cache", 1)

    def full(descriptor: int, written: bytes, offset: int) -> int:
        if at_once:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, written[:100], offset)

    pwrite = os.pwrite

    monkeypatch.setattr(os, "pwrite", full)
    assert cache.open(path).read() == content
    assert cache.open(path).read() == content
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("No space left on device") == 1


def test_a_folder_or_a_bound_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: cannot hold a cache .* --store-cache"):
        StoreCache(tmp_path / "file", 1)
    with pytest.raises(UserError, match=r"--store-cache-gib 0\.001: must be at least 0\.0156"):
        StoreCache(tmp_path / "cache", 0.001)


def _read_all(folder: Path, cache: Path, start: threading.Barrier, done: multiprocessing.Queue) -> None:
    CountedStore.requests.clear()
    CountedStore.delay = 0.05
    start.wait()
    its = StoreCache(cache, 1)
    same = all(its.open(UPath(f"counted://{path}")).read() == path.read_bytes() for path in sorted(folder.iterdir()))
    done.put((same, CountedStore.requests["read"]))


def test_processes_share_what_one_of_them_fetches(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    for number in range(6):
        an_object(tmp_path / "store", 1000 + number, str(number))
    context = multiprocessing.get_context("fork")
    start, done = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_read_all, args=(tmp_path / "store", tmp_path / "cache", start, done)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    results = [done.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(same for same, _ in results)
    assert sum(reads for _, reads in results) == 6
    assert not list((tmp_path / "cache").glob("*/*.part"))


def test_a_process_killed_while_it_fetches_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = an_object(tmp_path, 1000)
    cache = StoreCache(tmp_path / "cache", 1)

    def fetch_for_ever() -> None:
        CountedStore.delay = 1000.0
        cache.open(path).read()

    process = multiprocessing.get_context("fork").Process(target=fetch_for_ever)
    process.start()
    while not list(cache.folder.glob("*/*.part")):
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert cache.open(path).read() == content
    assert not list(cache.folder.glob("*/*.part"))
    # A file that nobody asks for again is deleted some time after.
    left = cache.folder / "ab" / "left.part"
    left.parent.mkdir(exist_ok=True)
    left.touch()
    os.utime(left, (1, 1))
    assert cache.num_bytes() == 1000
    assert not left.exists()


class Numbers(TrainingDataset):
    """Samples that are their draws; `together`: the most that were read at once."""

    remote = True

    def __init__(self, fails: int | None = None):
        self.fails, self.lock, self.now, self.together = fails, threading.Lock(), 0, 0

    def __len__(self) -> int:
        return 100

    def __getitem__(self, draw: Draw) -> Draw:
        with self.lock:
            self.now += 1
            self.together = max(self.together, self.now)
        time.sleep(0.005)
        with self.lock:
            self.now -= 1
        if draw.number == self.fails:
            raise UserError(f"draw {draw.number} is damaged")
        return draw


def sampler(first_step: int = 0) -> StepSampler:
    return StepSampler(100, 4, seed=3, first_step=first_step, last_step=30)


def test_samples_are_read_ahead_in_their_order() -> None:
    dataset = Numbers()
    ahead = ReadAhead(dataset, sampler())
    for draw in (draw for batch in sampler() for draw in batch):
        assert ahead[draw] == draw
    assert 2 < dataset.together <= AHEAD
    # What comes out of order is read all the same.
    assert ahead[Draw(7, 5000)] == Draw(7, 5000)


def test_an_error_comes_with_its_sample() -> None:
    ahead = ReadAhead(Numbers(fails=50), sampler())
    draws = [draw for batch in sampler() for draw in batch]
    assert [ahead[draw] for draw in draws[:50]] == draws[:50]
    with pytest.raises(UserError, match="draw 50 is damaged"):
        ahead[draws[50]]
    assert ahead[draws[51]] == draws[51]


def test_training_reads_the_same_from_a_store_with_and_without_the_cache_also_resumed(tmp_path: Path) -> None:
    local = write_synthetic_dataset(tmp_path / "ds", 3, frames=8, size=32, actions=True)

    def batches(data: str, first_step: int, workers: int = 0) -> torch.Tensor:
        pairs = FramePairs([open_dataset(data)], PairsConfig(size=32, cache_gib=0.0, horizon=0.2), "all")
        assert pairs.remote == data.startswith("counted")
        order = StepSampler(len(pairs), 4, seed=0, first_step=first_step, last_step=6)
        loader = batch_loader(pairs, collate_pairs, order, workers=workers, pin_memory=False)
        return torch.stack([batch["frames_BTCHW"] for batch in loader])

    expected, remote = batches(str(local.root), 0), f"counted://{local.root}"
    assert torch.equal(batches(remote, 0), expected)
    use_store_cache(tmp_path / "cache", 1)
    assert torch.equal(batches(remote, 0), expected)
    assert torch.equal(batches(remote, 4, workers=2), expected[4:])
    fetched = CountedStore.requests["read"]
    assert torch.equal(batches(remote, 0), expected)
    assert CountedStore.requests["read"] == fetched > 0

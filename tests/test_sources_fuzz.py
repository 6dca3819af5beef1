"""Damaged files of every kind that is read: a UserError, or all of what was there. Never a hang, a crash, or a silent

half. Seeded; the `slow` tests are the same with more cases.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapa import config as configs
from lapa.data.dataset import Dataset
from lapa.data.labels import MANIFEST, EpisodeLabels, Labels, Manifest, write_shard
from lapa.data.labels import shard_path as labels_shard
from lapa.data.spec import open_dataset
from lapa.errors import UserError
from lapa.sources import lapa_jsonl
from lapa.sources.lapa_jsonl import LapaJsonlReading
from lapa.sources.rlds import source as rlds
from lapa.sources.rlds.source import RldsReading
from lapa.sources.synthetic import write_synthetic_dataset
from tfds_files import episode, shard_path, write_folder

SECONDS = 20
MORE = 20


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rlds, lapa_jsonl):
        monkeypatch.setattr(module, "cached", lambda kind, key, make: json.loads(json.dumps(make())))


@contextmanager
def in_time() -> Iterator[None]:
    """Fails where what is inside hangs."""

    def late(*_: Any) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A bit flipped, the end cut off, a stretch of zeros, or some bytes too many."""
    place = int(rng.integers(len(content)))
    kind = rng.choice(["bit", "end", "zeros", "more"], p=[0.5, 0.25, 0.15, 0.1])
    if kind == "bit":
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    if kind == "end":
        return content[:place]
    if kind == "zeros":
        return content[:place] + bytes(min(16, len(content) - place)) + content[place + 16 :]
    return content[:place] + rng.bytes(5) + content[place:]


def fuzz(
    files: list[Path], read: Callable[[], Any], accept: Callable[[Any, bytes], bool], cases: int, seed: int
) -> int:
    """Damages one of the files at a time and reads. accept: given what was read and the damaged content, whether that

    is no silent half. Returns how often a UserError was raised.
    """
    num_refused = 0
    for case in range(cases):
        rng = np.random.default_rng([seed, case])
        path = files[int(rng.integers(len(files)))]
        whole = path.read_bytes()
        changed = damaged(whole, rng)
        path.write_bytes(changed)
        try:
            with in_time():
                found = read()
            assert changed == whole or accept(found, changed), f"case {case}: {path.name} is read as {found}"
        except UserError as error:
            num_refused += 1
            assert str(error), f"case {case}: {path.name}: an error without words"
        finally:
            path.write_bytes(whole)
    return num_refused


def everything(dataset: Dataset) -> list[tuple[Any, ...]]:
    """All of a dataset, image by image."""
    found = []
    for one in dataset.episodes:
        shown = [dataset.frames(one.index, None, camera) for camera in dataset.cameras]
        actions = None if dataset.action_dim is None else dataset.actions(one.index)
        found.append((one.length, one.instruction, [frames.sum() for frames in shown], actions))
    return found


def counts(dataset: Dataset) -> list[tuple[Any, ...]]:
    """How much there is of a dataset, once all of it has been read."""
    return [(length, len(shown)) for length, _, shown, _ in everything(dataset)]


def same(found: Any, wanted: Any) -> bool:
    return repr(found) == repr(wanted)


def tfrecords(folder: Path, cases: int) -> int:
    root = write_folder(folder, [episode(number, steps=3) for number in range(4)])
    files = [shard_path(root, number) for number in range(2)]

    def read() -> Any:
        return everything(RldsReading(str(root), fps=5.0).open().dataset())

    wanted = read()
    return fuzz(files, read, lambda found, _: same(found, wanted), cases, seed=1)


def tfds_metadata(folder: Path, cases: int) -> int:
    root = write_folder(folder, [episode(number, steps=3) for number in range(4)])

    def read() -> Any:
        return [length for length, *_ in everything(RldsReading(str(root), fps=5.0).open().dataset())]

    wanted = read()
    files = [root / "features.json", root / "dataset_info.json"]
    return fuzz(files, read, lambda found, _: found == wanted, cases, seed=2)


def jsonl_rows(folder: Path, cases: int) -> int:
    path = folder / "rows.jsonl"
    rows = [
        {"instruction": "push", "vision": [str(n)] * 4, "delta": ["1"] * 4, "fields": "[instruction],[vision],delta"}
        for n in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read() -> Any:
        dataset = LapaJsonlReading(str(path), image_codes=4).open().dataset()
        return sum(len(dataset.image_codes(one.index, range(one.length))) for one in dataset.episodes)

    # A file that ends where a row ends is a whole file.
    return fuzz([path], read, lambda found, content: found == len(content.splitlines()), cases, seed=3)


def dataset_folder(folder: Path, cases: int) -> int:
    root = folder / "dataset"
    write_synthetic_dataset(root, episodes=2, frames=6, size=32, actions=True)
    files = sorted(path for path in root.rglob("*") if path.suffix in (".parquet", ".mp4") or path.name == "info.json")

    def read() -> Any:
        return counts(open_dataset(root))

    wanted = read()
    return fuzz(files, read, lambda found, _: found == wanted, cases, seed=4)


def labels_folder(folder: Path, cases: int) -> int:
    root = folder / "labels"
    given = {number: EpisodeLabels(np.arange(5), np.full((5, 4), number)) for number in range(3)}
    write_shard(labels_shard(root, 0, 2), given)
    manifest = Manifest("lam", "data", "front", 0.6, 3, 4, 8, 15, 3, 0, [[1.0] + [0.0] * 7] * 4)
    configs.save(manifest, root / MANIFEST)

    def read() -> Any:
        labels = Labels.open(root)
        return [[part.tolist() for part in labels.codes(number)] for number in range(3)]

    wanted = read()
    return fuzz([labels_shard(root, 0, 2)], read, lambda found, _: found == wanted, cases, seed=5)


KINDS = {
    "tfrecords": (tfrecords, 80),
    "tfds_metadata": (tfds_metadata, 80),
    "jsonl_rows": (jsonl_rows, 150),
    "dataset_folder": (dataset_folder, 60),
    "labels_folder": (labels_folder, 100),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_told_or_does_no_harm(tmp_path: Path, kind: str) -> None:
    run, cases = KINDS[kind]
    assert run(tmp_path, cases) > cases / 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_more_damage_is_told_or_does_no_harm(tmp_path: Path, kind: str) -> None:
    run, cases = KINDS[kind]
    assert run(tmp_path, cases * MORE) > cases

"""Metadata of LeRobot datasets with every entry replaced or removed: whatever reads it succeeds or raises a UserError.

Each test takes a share of the cases, spread evenly; the `slow` ones take all.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from check_lerobot import write_v21
from rich.console import Console

from lapa.checksums import SUMS
from lapa.data import info
from lapa.data.config import HideActionsConfig
from lapa.data.convert import run as convert
from lapa.data.dataset import Dataset
from lapa.data.metadata import EXTRA, INFO, STATS, TASKS
from lapa.data.replace_actions import run as hide_actions
from lapa.data.spec import open_dataset
from lapa.data.writer import DatasetWriter
from lapa.errors import UserError
from lapa.sources.lerobot import LeRobotConfig

EPISODES_FILE, DATA = "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"
DEEP = json.loads("[" * 90 + "]" * 90)
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    float("inf"),
    float("nan"),
    10**400,
    "",
    "../x",
    "\x1b[2J\n",
    "\ud800",
    [],
    {},
]
ODD += [[[1]], [None], {"a": [None]}, {"0": "x"}, "{a}", DEEP]
# Of all cases, one in so many is tried by the quick tests.
SHARE = 9


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, rng = tmp_path_factory.mktemp("damage"), np.random.default_rng(0)
    writer = DatasetWriter(
        folder / "new", fps=10, cameras={"front": (16, 16)}, action_names=["x", "y"], state_names=["z"], control="delta"
    )
    for number in range(2):
        frames = rng.integers(0, 255, (4, 16, 16, 3), np.uint8)
        writer.add_episode({"front": frames}, f"task {number}", actions=np.eye(4)[:, :2], states=np.ones((4, 1)))
    write_v21(writer.finish(), folder / "old")
    # What is damaged on purpose has another checksum.
    for path in folder.glob(f"*/{SUMS}"):
        path.unlink()
    return {"new": folder / "new", "old": folder / "old"}


def steps(root: Path, out: Path, write: bool) -> Iterator[Callable[[], Any]]:
    """All that reads a dataset, one after another."""
    opened: list[Dataset] = []
    yield lambda: opened.append(open_dataset(root))
    if opened:
        dataset = opened[0]
        yield lambda: (repr(dataset), dataset.fingerprint, dataset.extra)
        yield lambda: dataset.action_space
        yield lambda: [(episode.length, episode.instruction, episode.source) for episode in dataset]
        for episode in range(len(dataset)):
            for camera in dataset.cameras:
                yield lambda e=episode, c=camera: dataset.frames(e, [0, -1 + dataset.lengths[e]], c)
            yield lambda e=episode: dataset.actions(e)
            yield lambda e=episode: dataset.states(e)
        yield lambda: Console(file=io.StringIO(), width=200).print(info.summary(dataset))
        yield lambda: info.contact_sheet(dataset)
    if write:
        yield lambda: hide_actions(HideActionsConfig(data=str(root), out=out / "hidden"))
        yield lambda: convert(LeRobotConfig(str(root), out=out / "converted", size=16, workers=1, skip_bad=True))


def drive(root: Path, out: Path, case: str, write: bool = True) -> list[str]:
    """Returns what other than a UserError of one line was raised."""
    wrong = []
    for number, step in enumerate(steps(root, out, write)):
        try:
            step()
        except UserError as error:
            if len(str(error).splitlines()) != 1 or not str(error).isprintable():
                wrong.append(f"{case}: step {number}: {str(error)!r}")
        except Exception as error:
            wrong.append(f"{case}: step {number}: {type(error).__name__}: {error}")
    shutil.rmtree(out, ignore_errors=True)
    return wrong


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the paths of all nodes of a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Returns the value with the node at `path` replaced; without it where `new` is Ellipsis."""
    if not path:
        return new
    value = copy.copy(value)
    if new is Ellipsis and len(path) == 1:
        del value[path[0]]
    else:
        value[path[0]] = changed(value[path[0]], path[1:], new)
    return value


def json_cases(file: Path) -> Iterator[tuple[str, str]]:
    """Yields contents of a file of JSON, or of JSON lines, with one node replaced or removed."""
    text = file.read_text()
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    for number, line in enumerate(lines[:1]):
        value = json.loads(line)
        for path in places(value):
            for new in [*ODD, *([...] if path else [])]:
                other = json.dumps(changed(value, path, new))
                shown = "gone" if new is ... else "deep" if new is DEEP else repr(new)
                yield f"{file.name} {path} {shown}", "\n".join([*lines[:number], other, *lines[number + 1 :]]) + "\n"
    for odd in (b"", b"{", b"\xff\xfe", b"[" * 200_000, b"null", b"\0" * 100, text.encode()[:-9]):
        yield f"{file.name} is {odd[:9]!r}", odd.decode("latin-1")


def parquet_cases(file: Path) -> Iterator[tuple[str, pa.Table]]:
    """Yields tables with one column removed, renamed, emptied, or of another type."""
    table = pq.read_table(file)
    for number, name in enumerate(table.column_names):
        if name.startswith("stats/") and number % 7:
            continue
        column, rows = table[name], len(table)
        yield f"{file} without {name}", table.drop_columns(name)
        yield (
            f"{file} renames {name}",
            table.rename_columns([f"{it}x" if it == name else it for it in table.column_names]),
        )
        columns: list[Any] = [
            pa.array([None, *column.to_pylist()[1:]], column.type),
            pa.nulls(rows, column.type),
            pa.nulls(rows),
            pa.array(["x\n\x1b[2J"] * rows),
            pa.array([b"\xff"] * rows),
            pa.array([-1] * rows),
            pa.array([2**62] * rows),
            pa.array([1e300] * rows),
            pa.array([float("nan")] * rows),
            pa.array([True] * rows),
            pa.array([[]] * rows),
            pa.array([[["a", None]]] * rows),
            pa.array([{"a": 1}] * rows),
            pa.array([list(range(row % 3)) for row in range(rows)]),
            pa.DictionaryArray.from_arrays(pa.array([0] * rows), pa.array(["x"])),
            pa.array(np.arange(rows)).cast(pa.timestamp("s")),
        ]
        for new in columns:
            yield f"{file} {name} {new.type} {str(new[:1])[:40]}", table.set_column(number, name, new)
    yield f"{file} without rows", table[:0]
    yield f"{file} without columns", table.select([])
    yield f"{file} twice", pa.concat_tables([table, table])
    yield f"{file} without the last row", table[:-1]
    yield f"{file} backwards", table.take(list(range(len(table)))[::-1])


@pytest.mark.parametrize(
    ("version", "name"),
    [(v, f) for v in ("new", "old") for f in (INFO, EXTRA, STATS)]
    + [("old", "meta/episodes.jsonl"), ("old", "meta/tasks.jsonl")],
)
@pytest.mark.parametrize("share", [SHARE, pytest.param(1, marks=pytest.mark.slow)])
def test_json_that_is_not_as_it_should_be_is_a_user_error(
    roots: dict[str, Path], tmp_path: Path, version: str, name: str, share: int
) -> None:
    root = tmp_path / "d"
    shutil.copytree(roots[version], root)
    if not (root / name).exists():
        pytest.skip("the version has no such file")
    wrong: list[str] = []
    for number, (case, content) in enumerate(list(json_cases(root / name))):
        if number % share == 0:
            (root / name).write_text(content, encoding="latin-1" if " is " in case else "utf-8")
            wrong += drive(root, tmp_path / "out", case, write=number % (7 * share) == 0)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("version", "name"), [("new", TASKS), ("new", EPISODES_FILE), ("new", DATA)])
@pytest.mark.parametrize("share", [SHARE, pytest.param(1, marks=pytest.mark.slow)])
def test_tables_that_are_not_as_they_should_be_are_a_user_error(
    roots: dict[str, Path], tmp_path: Path, version: str, name: str, share: int
) -> None:
    root = tmp_path / "d"
    shutil.copytree(roots[version], root)
    wrong: list[str] = []
    for number, (case, table) in enumerate(list(parquet_cases(root / name))):
        if number % share == 0:
            pq.write_table(table, root / name)
            wrong += drive(root, tmp_path / "out", case, write=True)
    assert not wrong, "\n".join(wrong)

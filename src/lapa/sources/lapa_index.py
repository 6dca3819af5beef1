"""Which rows of a file of the released LAPA code are one episode, found in one pass over them.

Rows whose ids, or whose pictures' paths, name the step of an episode are put together; others are an episode each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np

from lapa.console import progress
from lapa.data.source import Item
from lapa.errors import UserError
from lapa.sources.lapa_rows import Row, find_rows, parse_row

MEND = "mend the row, or leave out what is malformed: --skip-bad, or skip_bad=true with --data"


class RowEpisodes(Sequence[Item]):
    """Items, made when they are asked for: a file may have millions of rows."""

    def __init__(self, episodes: list[int], places: list[int], names: list[str], instructions: list[Any]):
        """episodes: first row of each; places: number, offset and length of each row, in the order of the episodes.

        names: of the first episodes, the others are called by their rows' numbers; instructions: all texts, and which
        of them each episode has.
        """
        self._starts = np.array([*episodes, len(places) // 3], np.int64)
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self._names = names
        self._texts, numbers = instructions
        self._text_of = np.array(numbers, np.int32)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"episode {index} of {len(self)}")
        index %= len(self)
        rows = self._places[self._starts[index] : self._starts[index + 1]]
        name = self._names[index] if index < len(self._names) else f"row {rows[0][0]}"
        place = tuple((int(number), int(offset), int(length)) for number, offset, length in rows)
        return Item(name, place, self._texts[self._text_of[index]], len(rows))


def look_through(path: Path, *, pictured: bool, picture_codes: int, skip_bad: bool) -> dict[str, Any]:
    """One pass over the rows: what all of them are like, and which of them are an episode. Plain JSON values.

    pictured: whether pictures are read even where there are codes; picture_codes, skip_bad: as in `LapaJsonlReading`.
    UserError naming the row that is malformed or not like the first one.
    """
    problems: list[str] = []
    first: Row | None = None
    texts: dict[str, int] = {}
    latent_length = 0
    steps: dict[str, list[tuple[int, int]]] = {}
    places: list[tuple[int, int, int]] = []
    said: list[int] = []
    alone: list[int] = []
    with progress() as bar:
        task = bar.add_task("looking through", total=path.stat().st_size, note="bytes")
        for number, offset, content in find_rows(path):
            bar.update(task, completed=offset + len(content))
            try:
                row = parse_row(content)
                coded = not pictured and (first or row).vision_N is not None
                _require_alike(row, first or row, picture_codes if coded else 0, latent_length)
            except ValueError as error:
                if not skip_bad:
                    raise UserError(f"{path}: row {number} {error}; {MEND}") from None
                problems.append(f"{path}: row {number} {error}")
                continue
            first = first or row
            latent_length = latent_length or len(row.delta_L or ())
            said.append(texts.setdefault(row.instruction, len(texts)))
            if row.episode is None:
                alone.append(len(places))
            else:
                steps.setdefault(row.episode[0], []).append((row.episode[1], len(places)))
            places.append((number, offset, len(content)))
    names, groups, notes = _group(steps, said)
    ordered = [row for rows in groups for row in rows] + alone
    starts = np.cumsum([0, *map(len, groups), *([1] * len(alone))])[:-1].tolist() if ordered else []
    firsts = [rows[0] for rows in groups] + alone
    return {
        "problems": problems,
        "notes": notes,
        "coded": not pictured and first is not None and first.vision_N is not None,
        "latent_length": latent_length,
        "action_dim": 0 if first is None or first.actions_A is None else len(first.actions_A),
        "state_names": [] if first is None else list(first.state_names),
        "names": names,
        "episodes": starts,
        "places": list(chain.from_iterable(places[row] for row in ordered)),
        "instructions": [list(texts), [said[row] for row in firsts]],
    }


def _group(
    steps: Mapping[str, list[tuple[int, int]]], said: Sequence[int]
) -> tuple[list[str], list[list[int]], Counter[str]]:
    """Names and rows of the episodes, in the order of their steps; names that hold a step twice tell no episodes."""
    names, groups = [], []
    notes: Counter[str] = Counter()
    for name, numbered in steps.items():
        numbered = sorted(numbered)
        numbers = [number for number, _ in numbered]
        rows = [row for _, row in numbered]
        if len(set(numbers)) < len(numbers):
            notes["rows whose ids are the same, taken as an episode each"] += len(rows)
            names += [f"{name} {number} #{place}" for place, number in enumerate(numbers)]
            groups += [[row] for row in rows]
            continue
        notes["episodes that lack steps in between"] += numbers[-1] - numbers[0] + 1 != len(numbers)
        notes["the instruction changes, the first is taken"] += len({said[row] for row in rows}) > 1
        names.append(name)
        groups.append(rows)
    return names, groups, +notes


def _require_alike(row: Row, first: Row, picture_codes: int, latent_length: int) -> None:
    """UserError where a row is not like the first one. picture_codes: of one picture; 0 where pictures are read."""
    if picture_codes:
        num = len(row.vision_N or ())
        if not num or num % picture_codes:
            raise UserError(f"has {num} codes in `vision`, which is no multiple of {picture_codes}")
    elif not row.image:
        raise UserError("has neither `vision` nor `image`" if row is first else "lacks `image`, which the first has")
    if row.delta_L is not None and latent_length not in (0, len(row.delta_L)):
        raise UserError(f"has {len(row.delta_L)} codes in `delta`, the others {latent_length}")
    for name, ours, its in (
        ("raw_actions", row.actions_A, first.actions_A),
        ("states", row.states_S, first.states_S),
    ):
        if (0 if ours is None else len(ours)) != (0 if its is None else len(its)):
            raise UserError(f"has other `{name}` than the first row")

"""What a page of `lapa view` shows: JSON and files by name, and the HTML that draws them.

Nothing else can be asked for: names hold numbers, no paths.
"""

from __future__ import annotations

import json
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar

from lapa.errors import UserError

# HTML, scripts and style.
PAGE = Path(__file__).with_name("page")
NAME = re.compile(r"([a-z]+)((?:-[0-9]{1,9})*)")


class UnknownNameError(KeyError):
    """A page has no data and no file of this name."""


class Pages(ABC):
    """The data of one page. A name is a word of `numbers` and as many numbers as are there: episode-17, code-0-5.

    body: the page's file in the folder page/, after its head. The JSON of a word is what the method `_WORD` returns for
    its numbers.
    questions: what the page asks with data of its own; `_ask_NAME` answers it, one at a time.
    """

    body: ClassVar[str]
    numbers: ClassVar[Mapping[str, int]]
    questions: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        self.lock = RLock()
        self._temporary = tempfile.TemporaryDirectory(prefix="lapa-view-")

    @property
    def folder(self) -> Path:
        """Where files that are made for the page lie."""
        return Path(self._temporary.name)

    @property
    def html(self) -> str:
        """The page: the head that all have, then its own scripts and body."""
        return "".join((PAGE / name).read_text(encoding="utf-8") for name in ("head.html", self.body))

    def close(self) -> None:
        """Removes the files that were made for the page."""
        self._temporary.cleanup()

    def json(self, name: str) -> dict[str, Any]:
        """Returns the data of a name. Raises UnknownNameError, or UserError for damaged files."""
        match = NAME.fullmatch(name)
        if match is None or match[1] not in self.numbers:
            raise UnknownNameError(name)
        numbers = [int(number) for number in match[2].split("-")[1:]]
        if len(numbers) != self.numbers[match[1]]:
            raise UnknownNameError(name)
        with self.reading(name):
            return getattr(self, f"_{match[1]}")(*numbers)

    def reading(self, name: str) -> AbstractContextManager[Any]:
        """What is held while the data of a name is made: one lock for all, unless a page reads in several threads."""
        return self.lock

    def answer(self, name: str, body: bytes) -> dict[str, Any]:
        """Returns what the method `_ask_NAME` returns for the JSON object that the page sent.

        Raises UnknownNameError for another name, UserError for what is asked wrongly.
        """
        if name not in self.questions:
            raise UnknownNameError(name)
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise UserError("expected a JSON object")
        with self.lock:
            return getattr(self, f"_ask_{name}")(given)

    @property
    def inputs(self) -> Sequence[str | Path]:
        """The folders that are read, which no export may replace."""
        return ()

    @property
    def exportable(self) -> bool:
        """Whether an export would show anything."""
        return True

    @property
    def left_out(self) -> str:
        """What an export leaves out, as one line; empty where it has everything."""
        return ""

    @property
    @abstractmethod
    def summary(self) -> str:
        """What is shown, in a few words."""

    @abstractmethod
    def names(self) -> Iterator[str]:
        """Yields every name of JSON, for an export."""

    def files(self) -> Iterator[str]:
        """Yields the name of every file, for an export."""
        yield from ()

    def file(self, name: str) -> Path:
        """Returns the file of a name, such as 17-0.mp4. Raises UnknownNameError, or UserError for damaged files."""
        raise UnknownNameError(name)

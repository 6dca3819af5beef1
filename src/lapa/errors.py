"""A mistake of the user, as one line: what was wrong, what was expected, how to fix it."""

from __future__ import annotations

import difflib
import re
import reprlib
import traceback
from collections.abc import Iterable
from pathlib import Path

# Ends of lines, with the blanks around them.
LINE_ENDS = re.compile(r"\s*[\t-\r\x1c-\x1e\x85\u2028\u2029]\s*")
# Control characters, marks that change the direction of a text or are not seen, and halves of a surrogate pair.
UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f]"
)

# How C and C++ libraries report that memory ran out.
SHORTAGE = re.compile(
    r"(can't|cannot|could not|unable to|failed to) (allocate|mmap|map segment|start new thread)|not enough memory|"
    r"out of memory|bad_alloc|malloc of size|could not create a primitive",
    re.IGNORECASE,
)
LONGEST_REASON = 200

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 120


class UserError(ValueError):
    """A mistake that the user can fix: one line with what was wrong, what was expected, and how to fix it.

    The command shows it as that line; any other exception is a bug and keeps its traceback. The message is `printable`.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(message))


class StoreError(UserError):
    """A store that fails or refuses: what is in it may be whole, so the command stops and nothing counts as damaged."""


def printable(text: object) -> str:
    """Returns a text as one line for a terminal, a log or an image: whatever a file holds cannot control these.

    Ends of lines become spaces, and control characters and their like escapes such as `\\x1b`.
    """
    line = LINE_ENDS.sub(" ", str(text))
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), line)


def out_of_memory(error: BaseException | None) -> str:
    """Returns how an error reports a lack of memory, or one that it was made from; "" for any other and for UserError.

    Python, NumPy, pyarrow and PyAV raise MemoryError. torch raises RuntimeError (its oneDNN "could not create a
    primitive"), a thread that cannot start too, and a library that finds no room ImportError.
    """
    while error is not None and not isinstance(error, UserError):
        message = printable(error)
        if isinstance(error, MemoryError):
            return message or "no more memory"
        if isinstance(error, RuntimeError | OSError | ImportError) and SHORTAGE.search(message):
            return message[:LONGEST_REASON]
        error = error.__cause__
    return ""


def place_and_reason(error: BaseException) -> str:
    """Returns an error that was raised as one line, with its type, and the function and file that raised it."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return printable(f"{type(error).__name__}: {error} (in {where.name} of {Path(where.filename).name})")


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not known, with the nearest known one: `raise unknown("preset", "tinny", ...)`."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {what} {name!r}{hint} (known: {', '.join(known)})")


def shown(value: object) -> str:
    """Returns a value of a file as one line of an error: its repr, shortened, without control characters."""
    return _brief.repr(value)

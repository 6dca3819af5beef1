"""A mistake of the user, as one line: what was wrong, what was expected, how to fix it."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 120


class UserError(ValueError):
    """A mistake that the user can fix: one line with what was wrong, what was expected, and how to fix it.

    The command shows it as that line; any other exception is a bug and keeps its traceback.
    """


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not known, with the nearest known one: `raise unknown("preset", "tinny", ...)`."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {what} {name!r}{hint} (known: {', '.join(known)})")


def shown(value: object) -> str:
    """Returns a value of a file as one line of an error: its repr, shortened, without control characters."""
    return _brief.repr(value)

"""Configs, the frozen dataclasses of each room, to and from JSON.

An error names the file, the key and, for a typo, the nearest known name.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lapa.errors import UserError, unknown
from lapa.files import as_path, read_json, write_json

Config = TypeVar("Config")

# Endings of the names of options, and the most that they may be. What is beyond takes all memory, or a day, and is a
# slip of the keyboard; what a machine has room for is decided where it is allocated.
MOST: tuple[tuple[tuple[str, ...], int], ...] = (
    (("_batch_size", "_codebook_size", "_num_bins", "_image_codes"), 1 << 20),
    (("_size", "_side", "_resolution", "_max_image"), 8192),
    # Of a cluster, and then of a machine.
    (("_num_workers",), 1 << 20),
    (("_layers", "_depth", "_workers", "_decoders", "_parallel", "_num_frames"), 1000),
    (("_width", "_widths", "_dim", "_dim_head", "_heads", "_lora_rank", "_fsq_levels"), 1 << 16),
    (("_latent_length", "_chunk"), 10_000),
    (("_episodes", "_frames", "_videos", "_rollouts", "_demonstrations", "_num_pairs", "_samples"), 10_000_000),
)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of a command that reports figures."""

    json: bool = False
    """Print the figures as one JSON object, and nothing else, to standard output."""


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values: paths become strings, tuples become lists."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_dict(cls: type[Config], values: Mapping[str, Any], source: str = "config") -> Config:
    """The inverse of `to_dict`. Raises UserError naming `source` on unknown or missing keys and wrong types."""
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: expected an object for {cls.__name__}, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise UserError(f"{source}: {unknown(f'key of {cls.__name__}', key, fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{source}: {cls.__name__} needs the key {name!r}")
    given = {key: typed(hints[key], value, f"{source}: {key}") for key, value in values.items()}
    try:
        return cls(**given)
    # Besides what a class refuses: a size of zero or an empty list, where it computes others from it.
    except (UserError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        why = error if isinstance(error, UserError) else f"no {cls.__name__} has these values ({error})"
        raise UserError(f"{source}: {why}") from None


def differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The differences of two configs as plain values: ["loop.optim.lr was 0.1, is 0.2"]; [] where they are equal.

    A path is equal to another that leads to the same place from here, as the absolute one to the relative one.
    """
    found = []
    for key in sorted({*then, *now}):
        before, after = then.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after and not _same_paths(before, after):
            found.append(f"{prefix}{key} was {before!r}, is {after!r}")
    return found


def require_same(path: Path, now: Mapping[str, Any], then: Mapping[str, Any] | None = None) -> None:
    """Raises UserError with the changes where the JSON file `path` exists and differs from `now` in a key of `now`.

    So `--resume` continues a command only under its first settings. then: settings used in place of the file's.
    """
    if not as_path(path).exists():
        return
    then = read_json(path) if then is None else then
    if not isinstance(then, Mapping):
        raise UserError(f"{path}: expected an object; use --overwrite to start anew")
    changed = differences({key: then.get(key) for key in now}, now)
    if changed:
        raise UserError(
            f"{path}: begun with other settings ({'; '.join(changed)}); use --overwrite to start anew, or another --out"
        )


def require_at_least(config: Any, **least: float) -> None:
    """Raises UserError naming the first option of `config` that is below its least value; None is not checked."""
    for name, minimum in least.items():
        value = getattr(config, name)
        if value is not None and not value >= minimum:
            raise UserError(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}")


def require_plausible(config: Any) -> None:
    """Raises UserError naming the first option that is more than its kind is ever meant to be (MOST)."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            require_plausible(value)
            continue
        most = next((most for names, most in MOST if f"_{field.name}".endswith(names)), math.inf)
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is int and number > most:
                raise UserError(f"--{field.name.replace('_', '-')} must be at most {most}, got {number}")


def save(config: Any, path: Path) -> None:
    """Writes a dataclass as JSON, atomically."""
    write_json(path, to_dict(config))


def load(cls: type[Config], path: Path) -> Config:
    """Reads what `save` wrote. Raises UserError naming the file."""
    return from_dict(cls, read_json(path), source=str(path))


def _same_paths(before: Any, after: Any) -> bool:
    """Whether two texts, or lists of them, are equal but for how they name files: [NAME=]PATH[,KEY=...]."""
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(_same_paths, before, after))
    if not isinstance(before, str) or not isinstance(after, str) or "://" in before + after or "\0" in before + after:
        return before == after
    then, now = (re.split("[=:,]", text) for text in (before, after))
    return len(then) == len(now) and all(Path(a).resolve() == Path(b).resolve() for a, b in zip(then, now, strict=True))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def typed(hint: Any, value: Any, source: str, text: bool = False) -> Any:
    """Returns `value`, as JSON gave it, in the type of the annotation `hint`.

    text: numbers, flags and lists are given as text, as in `--data PATH,camera=front+wrist`.
    Raises UserError naming `source` for a value of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return typed(arguments[0], value, source, text)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        if len(options) > 1 and all(map(dataclasses.is_dataclass, options)):
            options = [_of_kind(options, value, source)]
        return typed(options[0], value, source, text) if len(options) == 1 else value
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{source}: {unknown('value', str(value), map(str, arguments))}")
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, source)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{source}: expected an object, got {value!r}")
        return {key: typed(arguments[1], item, f"{source}.{key}", text) for key, item in value.items()}
    if origin in (tuple, list):
        values = value.split("+") if text else value
        if not isinstance(values, list | tuple):
            raise UserError(f"{source}: expected a list, got {value!r}")
        return origin(typed(arguments[0], item, source, text) for item in values)
    return _scalar(hint, value, source, text) if hint in (bool, int, float, str, Path) else value


def _scalar(hint: type, value: Any, source: str, text: bool) -> Any:
    error = UserError(f"{source}: expected {'true or false' if hint is bool else hint.__name__}, got {value!r}")
    try:
        if text and hint is bool:
            value = {"true": True, "false": False}[value.lower()]
        elif hint is Path or (text and hint is int) or (hint is float and (text or type(value) is int)):
            value = hint(value)
    except (KeyError, OverflowError, TypeError, ValueError):
        raise error from None
    infinite = not text and isinstance(value, float) and not math.isfinite(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)) or infinite:
        raise error
    return value


def _of_kind(options: list[Any], value: Any, source: str) -> Any:
    """Which of several dataclasses a value is of: each has a field `kind`, whose default names it."""
    kinds = {option.__dataclass_fields__["kind"].default: option for option in options}
    kind = value.get("kind") if isinstance(value, Mapping) else value
    if not isinstance(kind, str) or kind not in kinds:
        raise unknown(f"kind in {source}:", str(kind), kinds)
    return kinds[kind]

"""Help of one command: example commands, then its options under headings, the required and the common ones first.

The options are those that tyro makes of the command's config; their texts are the docstrings below the fields.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import tyro

COMMON = ("preset", "steps", "batch_size", "lr", "seed", "device", "overwrite", "resume", "json")
# Headings of the options of a nested config, by its field, where the field's name is not enough.
HEADINGS = {"loop": "Training loop", "optim": "Optimiser", "tiny": "Model, for --backbone tiny", "flow": "Flow head"}
METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
REQUIRED: tuple[Any, ...] = (dataclasses.MISSING, tyro.MISSING)
REQUIRED_HEADING = "Required"
WIDTH, COLUMN = 100, 30


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a command. call: its name and the form of its value; heading: the one it is listed under."""

    name: str
    positional: bool
    call: str
    text: str
    heading: str

    @property
    def required(self) -> bool:
        return self.heading == REQUIRED_HEADING


def command_help(name: str, description: str, config: type, default: Any, run: str) -> str:
    """The help of the command `name`. default: the config that its options start from, or None; run: "module:function",
    whose module's docstring has the examples, or else that of the config.
    """
    options = list(options_of(config, default))
    positional = "".join(f" {option.call}" for option in options if not option.call.startswith("--"))
    parts = [f"usage: lapa {name}{positional} [OPTIONS]", textwrap.fill(description, _width())]
    # The commands of several sources have one function.
    if lines := _examples(name, run.partition(":")[0]) or _examples(name, config.__module__):
        parts.append("Examples:\n" + "\n".join(f"  {line}" for line in lines))
    headings = [REQUIRED_HEADING, "Common", "Options", *(option.heading for option in options)]
    for heading in dict.fromkeys(headings):
        if listed := [option for option in options if option.heading == heading]:
            parts.append(f"{heading}:\n" + "\n".join(map(_listed, listed)))
    return "\n\n".join(parts) + "\n"


def data_help() -> str:
    """Examples and the form of `--data`: the docstring of lapa.data.spec without its last paragraph."""
    return _docstring("lapa.data.spec").rpartition("\n\n")[0] + "\n"


def options_of(config: type, default: Any, prefix: str = "", heading: str = "Options") -> Iterator[Option]:
    """The options of a config, those of nested configs under their own heading. default: as of `command_help`."""
    hints, texts = typing.get_type_hints(config, include_extras=True), _texts(config)
    for field in dataclasses.fields(config):
        marks: tuple[Any, ...] = getattr(hints[field.name], "__metadata__", ())
        hint = _stripped(hints[field.name])
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = value if default is None else getattr(default, field.name)
        if tyro.conf.Suppress in marks:
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            flat = any(getattr(mark, "name", None) == "" for mark in marks)
            title = HEADINGS.get(field.name, field.name.capitalize())
            yield from options_of(type(value), value, prefix if flat else f"{prefix}{field.name}.", title)
            continue
        required = any(value is missing for missing in REQUIRED)
        common = "Common" if field.name in COMMON and prefix == "" else heading
        shown = "" if required or value in (None, ()) else f" (default: {_shown(value)})"
        text = " ".join(texts.get(field.name, "").split()) + shown
        name, positional = f"{prefix}{field.name}".replace("_", "-"), tyro.conf.Positional in marks
        call = _call(name, hint, positional=positional)
        yield Option(name, positional, call, text.strip(), REQUIRED_HEADING if required else common)


def _stripped(hint: Any) -> Any:
    """A type without its marks and without None."""
    if typing.get_origin(hint) is typing.Annotated:
        return _stripped(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(option for option in typing.get_args(hint) if option is not type(None))
    return hint


def _call(name: str, hint: Any, *, positional: bool) -> str:
    if positional:
        return f"{name.upper()} ..." if typing.get_origin(hint) is tuple else name.upper()
    return f"--[no-]{name}" if hint is bool else f"--{name} {_metavar(hint)}"


def _metavar(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, arguments))
    if typing.get_origin(hint) in (tuple, list):
        return " ".join("..." if argument is Ellipsis else _metavar(argument) for argument in arguments)
    return METAVARS.get(hint, "VALUE")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@cache
def _texts(config: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and of its bases."""
    texts: dict[str, str] = {}
    for cls in reversed([cls for cls in config.__mro__ if dataclasses.is_dataclass(cls)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                texts[field.target.id] = ast.literal_eval(below.value)
    return texts


def _examples(name: str, module: str) -> list[str]:
    """The commands in a module's docstring."""
    lines = map(str.strip, _docstring(module).splitlines())
    return [line for line in lines if line.startswith(("lapa ", "torchrun ")) and f"lapa {name} " in f"{line} "]


def _docstring(module: str) -> str:
    """A module's docstring, read without importing the module."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} is a file"
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""


def _width() -> int:
    return min(WIDTH, max(60, shutil.get_terminal_size((WIDTH, 24)).columns))


def _listed(option: Option) -> str:
    lines = textwrap.wrap(option.text, _width() - COLUMN, break_long_words=False, break_on_hyphens=False) or [""]
    call = f"  {option.call}"
    if len(call) > COLUMN - 2:
        return "\n".join([call, *(f"{'':{COLUMN}}{line}" for line in lines)])
    return f"\n{'':{COLUMN}}".join([f"{call:<{COLUMN}}{lines[0]}".rstrip(), *lines[1:]])

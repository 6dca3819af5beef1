"""Reads a pickled map of arrays as data: nothing in the file is called, imported or run.

The authors of LWM released their image tokeniser so (their loader is `pickle.load`), and unpickling a file from
outside runs whatever code it names. Here its instructions are only listed (`pickletools`), and the few that build maps
of NumPy or JAX arrays are followed by hand; a file with any other is refused by name.

    read_pickled(Path("vqgan"))     # {"encoder": {"Conv_0": {"kernel": tensor, ...}, ...}, ...}
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from lapa.errors import UserError

# What a name in the file stands for; versions of NumPy, JAX and Flax differ in where it lives, not in what it does.
NAMES = {
    "numpy.core.multiarray _reconstruct": "empty array",
    "numpy._core.multiarray _reconstruct": "empty array",
    "numpy.core.numeric _frombuffer": "array of bytes",
    "numpy._core.numeric _frombuffer": "array of bytes",
    "numpy ndarray": "array type",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
    "__builtin__ bytes": "bytes",
    "jax._src.array _reconstruct_array": "jax array",
    "jax._src.device_array reconstruct_device_array": "jax array",
    "jax.interpreters.xla reconstruct_device_array": "jax array",
    "flax.core.frozen_dict FrozenDict": "map",
    "collections OrderedDict": "map",
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
IGNORED = ("PROTO", "FRAME")
TRUNCATED = ("exhausted before", "remain", "not enough data")
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# What a malformed file makes of code that expects a sound one.
MALFORMED = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
NUMBERS = re.compile(r"[biuf][0-9]{1,2}")


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever a malformed file raises inside is a UserError that names the file and says `what` it is."""
    try:
        yield
    except MALFORMED as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        raise UserError(f"{path}: {what} ({str(error) or type(error).__name__})") from None


@dataclass(frozen=True)
class Name:
    what: str


@dataclass
class Dtype:
    """`numpy.dtype`: first its code, then (by BUILD) its byte order."""

    code: str
    order: str = "<"

    @property
    def numpy(self) -> np.dtype:
        if not NUMBERS.fullmatch(self.code):
            raise TypeError(f"an array of {self.code!r}, not of numbers")
        return np.dtype(self.code).newbyteorder("big" if self.order == ">" else "little")


@dataclass
class Array:
    """An array: made empty, then (by BUILD) filled."""

    tensor: torch.Tensor | None = None


class _Mark:
    pass


def read_pickled(path: Path) -> dict[str, Any]:
    """The maps of the file, with tensors at their leaves.

    Raises UserError naming the file where it is truncated, or holds anything but maps of arrays.
    """
    reader = _Reader(path)
    with reading(path, "a pickle, but no map of arrays"):
        with path.open("rb") as file:
            for opcode, argument in _instructions(file, path):
                reader.follow(opcode, argument)
        tree: dict[str, Any] = _tensors(reader.stack.pop(), path, set())
        if not isinstance(tree, dict):
            raise TypeError("an array alone")
    return tree


def _instructions(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return
            yield opcode.name, argument
    except ValueError as error:
        if any(sign in str(error) for sign in TRUNCATED):
            raise UserError(f"{path}: truncated: the pickle ends before its end; download it again") from None
        raise


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def follow(self, opcode: str, argument: Any) -> None:
        """One instruction of the file, on the stack."""
        stack = self.stack
        if opcode in IGNORED:
            return
        if opcode in CONSTANTS:
            stack.append(CONSTANTS[opcode])
        elif opcode in EMPTY:
            stack.append(EMPTY[opcode]())
        elif opcode.startswith(
            ("BININT", "SHORT_BIN", "BINUNICODE", "BINBYTES", "BYTEARRAY", "LONG1", "SHORT_BINBYTES")
        ):
            stack.append(argument)
        elif opcode == "MARK":
            stack.append(_Mark())
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode in TUPLES:
            count = TUPLES[opcode]
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif opcode in ("APPEND", "APPENDS"):
            items = [stack.pop()] if opcode == "APPEND" else self._to_mark()
            stack[-1].extend(items)
        elif opcode in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if opcode == "SETITEM" else self._to_mark()
            if not all(isinstance(key, str) for key in items[::2]):
                raise TypeError("a map whose keys are not all text")
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            name = argument if opcode == "GLOBAL" else " ".join((stack.pop(-2), stack.pop()))
            if name not in NAMES:
                raise self._refused(f"names {name.replace(' ', '.')}")
            stack.append(Name(NAMES[name]))
        elif opcode in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(_made(stack.pop().what, arguments))
        elif opcode == "BUILD":
            state = stack.pop()
            _fill(stack[-1], state)
        else:
            raise self._refused(f"has the instruction {opcode}")

    def _to_mark(self) -> list[Any]:
        position = max(i for i, item in enumerate(self.stack) if isinstance(item, _Mark))
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def _refused(self, why: str) -> UserError:
        return UserError(
            f"{self.path}: a pickle that {why}, so it is not only a map of arrays; pickles are read as data and never "
            "run. Where you trust the file, load it where it was made and save its arrays with flax.serialization"
        )


def _made(what: str, arguments: tuple[Any, ...]) -> Any:
    """What a call in the file would give."""
    if what == "empty array":
        return Array()
    if what == "array of bytes":
        buffer, dtype, shape, order = arguments
        array = Array()
        _fill(array, (1, shape, dtype, order == "F", buffer))
        return array
    if what == "dtype":
        return Dtype(arguments[0])
    # As pickles of protocol 2 write bytes, and those of no length.
    if what == "encode" and arguments[1:] == ("latin1",):
        return arguments[0].encode("latin1")
    if what == "bytes" and not arguments:
        return b""
    if what == "jax array":
        array = Array()
        _fill(array, arguments[2])
        return array
    if what == "map" and all(isinstance(argument, dict) for argument in arguments):
        return arguments[0] if arguments else {}
    raise TypeError(f"{what} is not to be called so")


def _fill(target: Any, state: Any) -> None:
    """What `__setstate__` would do to an array or a dtype."""
    if isinstance(target, Dtype):
        target.order = state[1]
        return
    _, shape, dtype, fortran, raw = state[-5:] if len(state) >= 5 else (1, *state)
    if not all(isinstance(size, int) for size in shape):
        raise TypeError("an array whose shape is not of numbers")
    array = np.frombuffer(raw, dtype.numpy)
    if array.size != math.prod(shape):
        raise TypeError(f"an array of {array.size} numbers cannot have the shape {shape}")
    array = array.reshape(shape, order="F" if fortran else "C")
    native = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    # The file's bytes are read-only, and torch wants what it holds to be writable.
    target.tensor = torch.from_numpy(native.reshape(shape).copy())


def _tensors(value: Any, path: Path, seen: set[int]) -> Any:
    if isinstance(value, dict):
        if id(value) in seen:
            # It may hold itself, or double at each of many levels.
            raise UserError(f"{path}: a pickle with the same map in two places, as no map of arrays has")
        seen.add(id(value))
        return {key: _tensors(item, path, seen) for key, item in value.items()}
    if isinstance(value, Array) and value.tensor is not None:
        return value.tensor
    raise UserError(f"{path}: a pickle with {type(value).__name__} where an array was expected")

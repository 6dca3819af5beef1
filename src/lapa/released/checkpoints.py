"""Reads the weights that LAPA's and LWM's authors released from JAX, without JAX: an index first, tensors on demand.

    weights = open_checkpoint(Path("params"))
    weights.shapes["transformer/wte/embedding"]                       # (32000, 4096)
    weights.read("transformer/h/scan_decoder/attention/wq/kernel", 3)  # layer 3 alone

Three kinds of file are told apart by their first bytes:

streaming  msgpack records one after another, each a pair: the parts of a tensor's name, and the bytes of the tensor as
           Flax writes one (LAPA's and LWM's `params`, bfloat16). A whole train state has its weights under `params`,
           beside the optimiser's state and the step, which are left unread and named in `skipped`.
flax       one msgpack map of maps whose leaves are such tensors.
pickle     a pickled map of maps of NumPy or JAX arrays (the released `vqgan`): lapa.released.checkpoints.

A tensor of Flax is a msgpack extension of type 1 (3 for a scalar) that holds its shape, the name of its dtype and its
bytes in C order; one of more than 2^30 bytes is a map with its shape and its flat chunks. Opening a file reads names,
shapes and offsets only, by skipping over all else, so that memory is spent on the tensor asked for and no other.
Format: https://github.com/young-geng/EasyLM (checkpoint.py), https://flax.readthedocs.io (serialization), msgpack.org.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lapa.errors import UserError

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "uint32": torch.uint32,
    "int64": torch.int64,
    "bool": torch.bool,
}
CHUNKED = "__msgpack_chunked_array__"
TENSOR_EXTENSIONS = (1, 3)
LONGEST_TEXT = 4096


@dataclass(frozen=True)
class Span:
    """Bytes of the file that were skipped; `extension` is the msgpack type of an extension, else None."""

    start: int
    length: int
    extension: int | None = None


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the file: its bytes in C order, in one piece or several."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Span, ...]


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file, by name (parts joined by "/"), read when asked for.

    skipped: what lies in the file beside the weights.
    """

    def __init__(self, path: Path, index: Mapping[str, Stored], skipped: tuple[str, ...] = ()) -> None:
        self.path, self.skipped, self._index = path, skipped, dict(index)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self._index.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: stored.dtype for name, stored in self._index.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        # A Mapping would read the tensor to answer this.
        return name in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A whole tensor, or one entry along its first axis, which is all that is then read."""
        stored = self._index[name]
        shape = stored.shape if index is None else stored.shape[1:]
        length = math.prod(shape) * stored.dtype.itemsize
        raw = torch.empty(length, dtype=torch.uint8)
        with self.path.open("rb") as file:
            _read_into(file, stored.pieces, (index or 0) * length, raw)
        return raw.view(stored.dtype).view(shape)


def open_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """The index of a released file. UserError naming the file where it is absent, truncated or of no such kind."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a file that the authors of LAPA or LWM released")
    with reading(path, "not a checkpoint of the released format"), path.open("rb") as file:
        first = file.read(2)
        if len(first) == 2 and first[0] == 0x80 and 2 <= first[1] <= 5:
            return flatten(read_pickled(path))
        scanner = _Scanner(file, path)
        if scanner.size == 0:
            raise UserError(f"{path}: truncated: the file is empty")
        file.seek(0)
        if first[0] == 0x92:
            return _index_stream(scanner)
        if first[0] & 0xF0 == 0x80 or first[0] in (0xDE, 0xDF):
            flat = flatten(scanner.value())
            return StoredTensors(path, {name: _stored(leaf, scanner, name) for name, leaf in flat.items()})
    raise UserError(f"{path}: neither a streaming checkpoint, nor a msgpack file of Flax, nor a pickled map of arrays")


def shapes_of(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors or arrays, without reading those that lie in a file."""
    if isinstance(params, StoredTensors):
        return params.shapes
    return {name: tuple(array.shape) for name, array in params.items()}


def require_shapes(what: str, given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """UserError listing every tensor that is missing, left over or of another shape."""
    complaints = [f"{name}: missing, expected shape {shape}" for name, shape in expected.items() if name not in given]
    for name, shape in given.items():
        if name not in expected:
            complaints.append(f"{name}: not a name of {what}")
        elif shape != expected[name]:
            complaints.append(f"{name}: shape {shape}, expected {expected[name]}")
    if complaints:
        raise UserError(f"the weights do not fit {what}:\n  " + "\n  ".join(complaints))


def require_floats(params: Mapping[str, Any]) -> None:
    """UserError listing every tensor or array that is not of floating-point numbers; none in a file is read."""
    dtypes = params.dtypes if isinstance(params, StoredTensors) else {name: each.dtype for name, each in params.items()}
    wrong = [f"{name}: {dtype}" for name, dtype in dtypes.items() if not dtype.is_floating_point]
    if wrong:
        raise UserError("expected weights of floating-point numbers:\n  " + "\n  ".join(wrong))


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """A map of maps as one map, names joined by "/"; an outermost `params` is left out, and so are empty maps."""
    if not prefix and set(tree) == {"params"} and isinstance(tree["params"], Mapping):
        return flatten(tree["params"])
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and CHUNKED not in value:
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _index_stream(scanner: _Scanner) -> StoredTensors:
    found: dict[tuple[str, ...], Any] = {}
    while scanner.position < scanner.size:
        record = scanner.value()
        if not (isinstance(record, list) and len(record) == 2 and isinstance(record[0], list)):
            raise scanner.malformed("expected a record of a name and a tensor")
        key = tuple(map(str, record[0]))
        if key in found:
            raise UserError(f"{scanner.path}: {'/'.join(key)} is there twice")
        found[key] = record[1]
    # A train state holds its weights under `params` beside `opt_state` and `step`; saved alone, they have no prefix,
    # or as many `params` as the authors' nesting gave them.
    inside = {key for key in found if key[0] == "params"}
    kept = {key: value for key, value in found.items() if not inside or key in inside}
    skipped = tuple("/".join(key) for key in found if key not in kept)
    index = {}
    for key, value in kept.items():
        name = "/".join(part for position, part in enumerate(key) if set(key[: position + 1]) != {"params"})
        leaf = scanner.inside(value) if isinstance(value, Span) else value
        if leaf != {}:
            index[name] = _stored(leaf, scanner, name)
    return StoredTensors(scanner.path, index, skipped)


def _stored(leaf: Any, scanner: _Scanner, name: str) -> Stored:
    if isinstance(leaf, dict) and CHUNKED in leaf:
        shape = tuple(leaf["shape"][str(axis)] for axis in range(len(leaf["shape"])))
        chunks = [_stored(leaf["chunks"][str(i)], scanner, name) for i in range(len(leaf["chunks"]))]
        stored = Stored(shape, chunks[0].dtype, tuple(piece for chunk in chunks for piece in chunk.pieces))
    elif isinstance(leaf, Span) and leaf.extension in TENSOR_EXTENSIONS:
        shape, dtype, span = scanner.inside(leaf)
        dtype = scanner.text(dtype) if isinstance(dtype, Span) else dtype
        if dtype not in DTYPES:
            raise UserError(f"{scanner.path}: {name} is of dtype {dtype}, which this reader does not know")
        if not isinstance(span, Span):
            raise TypeError(f"{name} has no bytes")
        stored = Stored(tuple(shape), DTYPES[dtype], (span,))
    else:
        raise UserError(f"{scanner.path}: {name} is no tensor, but {type(leaf).__name__}")
    if not all(type(size) is int and size >= 0 for size in stored.shape):
        raise TypeError(f"{name} has the shape {stored.shape}")
    held, needed = sum(piece.length for piece in stored.pieces), math.prod(stored.shape) * stored.dtype.itemsize
    if held != needed:
        raise UserError(f"{scanner.path}: {name} has {held:,} bytes, but its shape {stored.shape} needs {needed:,}")
    return stored


def _read_into(file: BinaryIO, pieces: tuple[Span, ...], skip: int, raw: Tensor) -> None:
    """Fills `raw` with the bytes after the first `skip` of the pieces."""
    view: Any = memoryview(raw.numpy())  # type: ignore[arg-type]
    filled = 0
    for piece in pieces:
        if skip >= piece.length:
            skip -= piece.length
            continue
        count = min(piece.length - skip, len(view) - filled)
        file.seek(piece.start + skip)
        if file.readinto(view[filled : filled + count]) != count:  # type: ignore[attr-defined]
            raise UserError(f"{file.name}: became shorter while it was read")
        filled, skip = filled + count, 0
        if filled == len(view):
            return


class _Scanner:
    """A msgpack reader that skips over binary data, extensions and long strings, and says where they lie."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path, self._file = path, file
        self.size = path.stat().st_size

    @property
    def position(self) -> int:
        return self._file.tell()

    def malformed(self, why: str) -> UserError:
        return UserError(f"{self.path}: not a checkpoint of the released format (byte {self.position:,}: {why})")

    def inside(self, span: Span) -> Any:
        """The msgpack value that the skipped bytes hold; the position stays."""
        back = self.position
        self._file.seek(span.start)
        value = self.value()
        self._file.seek(back)
        return value

    def text(self, span: Span) -> str:
        """The skipped bytes as text; the position stays."""
        back = self.position
        self._file.seek(span.start)
        text = self._file.read(span.length).decode()
        self._file.seek(back)
        return text

    def value(self) -> Any:
        """The next value: None, a number, a string, a list, a dict, or the Span of what was skipped."""
        code = self._number("B")
        if code < 0x80:
            return code
        if code < 0x90:
            return self._map(code & 0x0F)
        if code < 0xA0:
            return [self.value() for _ in range(code & 0x0F)]
        if code < 0xC0:
            return self._string(code & 0x1F)
        if code >= 0xE0:
            return code - 256
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if 0xC4 <= code <= 0xC6:
            return self._skip(self._number("BHI"[code - 0xC4]))
        if 0xC7 <= code <= 0xC9:
            length = self._number("BHI"[code - 0xC7])
            return self._skip(length, self._number("b"))
        if 0xCA <= code <= 0xD3:
            return self._number("fdBHIQbhiq"[code - 0xCA])
        if 0xD4 <= code <= 0xD8:
            return self._skip(1 << (code - 0xD4), self._number("b"))
        if 0xD9 <= code <= 0xDB:
            return self._string(self._number("BHI"[code - 0xD9]))
        if code in (0xDC, 0xDD):
            return [self.value() for _ in range(self._number("HI"[code - 0xDC]))]
        if code in (0xDE, 0xDF):
            return self._map(self._number("HI"[code - 0xDE]))
        raise self.malformed(f"0x{code:02x} begins no msgpack value")

    def _number(self, kind: str) -> Any:
        raw = self._file.read(struct.calcsize(kind))
        if len(raw) < struct.calcsize(kind):
            raise self._truncated(struct.calcsize(kind) - len(raw))
        return struct.unpack(f">{kind}", raw)[0]

    def _string(self, length: int) -> str | Span:
        # msgpack before 1.0 wrote binary data as strings.
        span = self._skip(length)
        if length > LONGEST_TEXT:
            return span
        self._file.seek(span.start)
        raw = self._file.read(length)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return span

    def _map(self, count: int) -> dict[Any, Any]:
        pairs = [(self.value(), self.value()) for _ in range(count)]
        return {key if isinstance(key, str) else str(key): value for key, value in pairs}

    def _skip(self, length: int, extension: int | None = None) -> Span:
        start = self.position
        if start + length > self.size:
            raise self._truncated(start + length - self.size)
        self._file.seek(start + length)
        return Span(start, length, extension)

    def _truncated(self, missing: int) -> UserError:
        return UserError(f"{self.path}: truncated: {missing:,} bytes or more are missing at its end; download it again")


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

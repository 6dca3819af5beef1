"""Reads the weights that LAPA's and LWM's authors released from JAX: without JAX, and without running the file.

    weights = open_checkpoint(Path("params"))
    weights.shapes["transformer/wte/embedding"]                       # (32000, 4096)
    weights.read("transformer/h/scan_decoder/attention/wq/kernel", 3)  # layer 3 alone

Two formats, recognised by their first bytes:

streaming  msgpack records one after another, each a pair: the parts of a tensor's name, and the tensor as Flax writes
           one (LAPA's and LWM's `params`, bfloat16). A whole train state has its weights under `params`, next to the
           optimizer's state and the step, which stay unread and are listed in `skipped`.
pickle     a pickled map of maps of NumPy or JAX arrays (the released `vqgan`). Only the names of `ALLOWED` may stand
           in it, and each is replaced by a stand-in that holds data.

Flax writes a tensor as a msgpack extension of type 1 (3 for a scalar) with its shape, the name of its dtype and its
bytes in C order; one of more than 2^30 bytes as a map of its shape and its flat chunks. Opening a streaming file reads
names and shapes and skips the rest, so that memory is spent on the tensor asked for and no other.
Format: https://github.com/young-geng/EasyLM (checkpoint.py), https://flax.readthedocs.io (serialization), msgpack.org.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor

from lapa.errors import UserError

# Errors that code for sound files raises on a malformed one. RecursionError is a RuntimeError.
MALFORMED = (
    *(pickle.UnpicklingError, SafetensorError, StrictDataclassError, struct.error),
    *(EOFError, OSError, MemoryError, RuntimeError),
    *(ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError),
)
TRUNCATED = "truncated: the file ends before its end; download it again"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.uint32, torch.int64, torch.bool)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*FLOATS, *INTEGERS)}


@contextmanager
def malformed(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a malformed file raises inside into a UserError: the file, `what` is wrong, and why."""
    try:
        yield
    except MALFORMED as error:
        if isinstance(error, UserError) and str(error).startswith(f"{path}: "):
            raise
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: {what} ({why})") from None


@dataclass(frozen=True)
class Span:
    """Bytes of the file; `extension` is the type of a msgpack extension, None for plain binary data."""

    start: int
    length: int
    extension: int | None = None


@dataclass(frozen=True)
class Stored:
    """The place of a tensor in the file: its bytes in C order, in one piece or several."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Span, ...]


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file, by name (parts joined by "/"), read when asked for.

    skipped: the names of what the file holds next to the weights.
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
    """The tensors of a released file, by name. Raises UserError naming a file that is absent, truncated or malformed.

    A streaming file is only indexed, and its tensors read on demand; a pickle is read whole.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a file that the authors of LAPA or LWM released")
    with path.open("rb") as file:
        first = file.read(2)
    if not first:
        raise UserError(f"{path}: {TRUNCATED}")
    if first[0] == 0x80 and 2 <= first[-1] <= 5:
        with malformed(path, "not a pickled map of arrays"):
            return _read_pickle(path)
    if first[0] == 0x92:
        with malformed(path, "not a streaming checkpoint"):
            return _index_stream(path)
    raise UserError(f"{path}: neither a streaming checkpoint nor a pickled map of arrays; name a released file")


def shapes_of(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors or arrays; those in a file are not read."""
    if isinstance(params, StoredTensors):
        return params.shapes
    return {name: tuple(array.shape) for name, array in params.items()}


def require_shapes(what: str, given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError that lists the `misfits`."""
    if complaints := misfits(what, given, expected):
        raise UserError(f"the weights do not fit {what}: " + "; ".join(complaints))


def misfits(what: str, given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns a complaint about every tensor that is missing, left over or of another shape."""
    complaints = [f"{name}: missing, expected shape {shape}" for name, shape in expected.items() if name not in given]
    for name, shape in given.items():
        if name not in expected:
            complaints.append(f"{name}: not a name of {what}")
        elif shape != expected[name]:
            complaints.append(f"{name}: shape {shape}, expected {expected[name]}")
    return complaints


def require_floats(params: Mapping[str, Any]) -> None:
    """Raises UserError that lists every tensor whose numbers are not floating-point; none in a file is read."""
    dtypes = params.dtypes if isinstance(params, StoredTensors) else {name: each.dtype for name, each in params.items()}
    wrong = [f"{name}: {dtype}" for name, dtype in dtypes.items() if not dtype.is_floating_point]
    if wrong:
        raise UserError("expected weights of floating-point numbers: " + "; ".join(wrong))


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
            raise UserError(f"{file.name}: became shorter while it was read; run the command again")
        filled, skip = filled + count, 0
        if filled == len(view):
            return


# First byte of a msgpack value -> width of its length in bytes, or the length itself.
BINARY = {0xC4: 1, 0xC5: 2, 0xC6: 4}
EXTENSION = {0xC7: 1, 0xC8: 2, 0xC9: 4}
FIXED_EXTENSION = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
TENSOR_EXTENSIONS = (1, 3)
# Most bytes of a name, a shape or a header.
WINDOW = 4096


class _Cursor:
    """A position in a msgpack file. Small values are unpacked; binary data and extensions are skipped unread."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        try:
            import msgpack
        except ImportError:
            raise UserError(
                f'{path}: reading a streaming checkpoint needs msgpack; install it: pip install "lapa-vla[import]"'
            ) from None
        self.path, self.position, self.size = path, 0, path.stat().st_size
        self._file, self._msgpack = file, msgpack

    def unpack(self, method: str = "unpack") -> Any:
        """The next value, or the count of its entries: "read_array_header", "read_map_header"."""
        unpacker = self._msgpack.Unpacker(max_buffer_size=WINDOW)
        unpacker.feed(self._peek(WINDOW))
        try:
            value = getattr(unpacker, method)()
        except self._msgpack.OutOfData:
            if self.position + WINDOW < self.size:
                raise ValueError(f"byte {self.position:,}: a name or shape of more than {WINDOW} bytes") from None
            raise UserError(f"{self.path}: {TRUNCATED}") from None
        except ValueError as error:
            raise ValueError(f"byte {self.position:,}: {error}") from None
        self.position += unpacker.tell()
        return value

    def expect(self, length: int) -> None:
        """Steps into an array, which must have `length` entries."""
        if (found := self.unpack("read_array_header")) != length:
            raise ValueError(f"byte {self.position:,}: expected {length} entries, found {found}")

    @property
    def at_extension(self) -> bool:
        return self._peek(1)[0] in (*EXTENSION, *FIXED_EXTENSION)

    def skip(self) -> Span:
        """Steps over binary data or an extension, which msgpack's own `skip` would read into memory."""
        head = self._peek(6)
        code = head[0] if head else -1
        width = BINARY.get(code, 0) or EXTENSION.get(code, 0)
        if not width and code not in FIXED_EXTENSION:
            raise ValueError(f"byte {self.position:,}: expected binary data or an extension")
        length = FIXED_EXTENSION.get(code) or int.from_bytes(head[1 : 1 + width], "big")
        begin = 1 + width + (code not in BINARY)
        start, end = self.position + begin, self.position + begin + length
        if end > self.size:
            raise UserError(f"{self.path}: {TRUNCATED}")
        self.position = end
        return Span(start, length, None if code in BINARY else head[begin - 1])

    def _peek(self, count: int) -> bytes:
        self._file.seek(self.position)
        return self._file.read(count)


def _index_stream(path: Path) -> StoredTensors:
    found: dict[tuple[str, ...], Span] = {}
    index = {}
    with path.open("rb") as file:
        cursor = _Cursor(file, path)
        while cursor.position < cursor.size:
            cursor.expect(2)
            key = tuple(map(str, cursor.unpack()))
            if key in found:
                raise ValueError(f"{'/'.join(key)} is there twice")
            found[key] = cursor.skip()
        # A train state holds its weights under `params` next to `opt_state` and `step`; saved alone, they have no
        # prefix, or as many `params` as the authors' nesting gave them.
        inside = {key for key in found if key[0] == "params"}
        kept = {key: span for key, span in found.items() if not inside or key in inside}
        for key, span in kept.items():
            name = "/".join(part for position, part in enumerate(key) if set(key[: position + 1]) != {"params"})
            cursor.position = span.start
            with malformed(path, f"no tensor at {name}"):
                stored = _tensor_at(cursor)
            if stored is not None:
                index[name] = stored
    return StoredTensors(path, index, skipped=tuple("/".join(key) for key in found if key not in kept))


def _tensor_at(cursor: _Cursor) -> Stored | None:
    """The tensor that begins at the cursor; None where there is an empty map."""
    if cursor.at_extension:
        return _array_at(cursor)
    entries: dict[str, Any] = {}
    for _ in range(cursor.unpack("read_map_header")):
        key = cursor.unpack()
        if key == "chunks":
            count = cursor.unpack("read_map_header")
            entries[key] = {cursor.unpack(): _array_at(cursor) for _ in range(count)}
        else:
            entries[key] = cursor.unpack()
    if not entries:
        return None
    shape = tuple(entries["shape"][str(axis)] for axis in range(len(entries["shape"])))
    chunks = [entries["chunks"][str(number)] for number in range(len(entries["chunks"]))]
    return _checked(Stored(shape, chunks[0].dtype, tuple(piece for chunk in chunks for piece in chunk.pieces)))


def _array_at(cursor: _Cursor) -> Stored:
    """The extension that begins at the cursor, as Flax writes an array."""
    whole = cursor.skip()
    if whole.extension not in TENSOR_EXTENSIONS:
        raise ValueError(f"expected a msgpack extension of type 1 or 3, got {whole.extension}")
    cursor.position = whole.start
    cursor.expect(3)
    shape, dtype, data = tuple(cursor.unpack()), cursor.unpack(), cursor.skip()
    if cursor.position != whole.start + whole.length:
        raise ValueError("the length of an array and of its parts differ")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    return _checked(Stored(shape, DTYPES[dtype], (data,)))


def _checked(stored: Stored) -> Stored:
    if not all(type(size) is int and size >= 0 for size in stored.shape):
        raise ValueError(f"shape {stored.shape}")
    held, needed = sum(piece.length for piece in stored.pieces), math.prod(stored.shape) * stored.dtype.itemsize
    if held != needed:
        raise ValueError(f"{held:,} bytes, but its shape {stored.shape} needs {needed:,}")
    return stored


# How many times as long as a pickle its arrays may be: two names may share one.
MOST_BYTES = 2
# Most axes of an array, as NumPy's; least bytes of a map's entry in a file.
MOST_AXES, ENTRY_BYTES = 64, 10


class _Dtype:
    """Stands in for `numpy.dtype`: first the code, then by BUILD the byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    @property
    def numpy(self) -> np.dtype:
        if not re.fullmatch(r"[biuf][0-9]{1,2}", self.code):
            raise TypeError(f"an array of {self.code!r}, not of numbers")
        return np.dtype(self.code).newbyteorder("big" if self.order == ">" else "little")


class _Array:
    """Stands in for an array: made empty, then by BUILD given its shape, dtype and bytes, which are not copied."""

    def __init__(self, *state: Any) -> None:
        self.shape: tuple[int, ...] | None = None
        if state:
            self.__setstate__(state)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.shape, dtype, self.fortran, self.raw = state[-4:]
        self.dtype = dtype.numpy
        if len(self.shape) > MOST_AXES or not all(type(size) is int and 0 <= size < 1 << 63 for size in self.shape):
            raise TypeError("an array whose shape is not of whole numbers")
        needed = math.prod(self.shape) * self.dtype.itemsize
        if not isinstance(self.raw, bytes | bytearray) or len(self.raw) != needed:
            raise TypeError(f"an array of shape {list(self.shape)} whose bytes are not the {needed:,} that it needs")

    def tensor(self) -> Tensor:
        """The array in memory of its own."""
        array = np.frombuffer(self.raw, self.dtype).reshape(self.shape, order="F" if self.fortran else "C")
        # torch takes no other byte order, and wants writable memory.
        return torch.from_numpy(np.array(array, dtype=self.dtype.newbyteorder("="), order="C"))


def _empty(kind: Any, shape: Any, code: Any) -> _Array:
    return _Array()


def _of_jax(build: Any, arguments: Any, state: tuple[Any, ...], aval: Any) -> _Array:
    return _Array(*state)


def _from_buffer(raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    return _Array(shape, dtype, order == "F", raw)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise TypeError(f"encoding {encoding!r}")
    return text.encode("latin1")


# The names that a file may have, and the function called for each, with the arguments of the libraries. Versions of
# NumPy, JAX and Flax differ in the module. Protocol 2 writes bytes as text in latin1, and those of no length as a call.
ALLOWED: dict[str, Callable[..., Any]] = {
    "numpy.core.multiarray._reconstruct": _empty,
    "numpy._core.multiarray._reconstruct": _empty,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.numeric._frombuffer": _from_buffer,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _latin1,
    "__builtin__.bytes": lambda: b"",
    "jax._src.array._reconstruct_array": _of_jax,
    "jax._src.device_array.reconstruct_device_array": _of_jax,
    "jax.interpreters.xla.reconstruct_device_array": _of_jax,
    "flax.core.frozen_dict.FrozenDict": lambda entries: dict(entries),
    "collections.OrderedDict": lambda: {},
}


class _StandIn:
    """Stands in for a name in the file: it can be called, and a pickle can change nothing in it."""

    def __init__(self, name: str, spend: Callable[[int], None]) -> None:
        self._name, self._spend = name, spend

    def __call__(self, *arguments: Any) -> Any:
        # A call copies text or a map, which the file may hold once and name again and again.
        copied = next((one for one in arguments if isinstance(one, str | dict)), "")
        self._spend(len(copied) * (ENTRY_BYTES if isinstance(copied, dict) else 1))
        try:
            return ALLOWED[self._name](*arguments)
        except TypeError as error:
            raise TypeError(f"a call of {self._name} that builds no array: {error}") from None

    def __setstate__(self, state: Any) -> None:
        raise TypeError(f"a state for {self._name}")


class _Unpickler(pickle.Unpickler):
    """Builds plain data and stand-ins; refuses a file that names anything else, or has them build too much."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file)
        self._size, self._left = size, MOST_BYTES * size + WINDOW

    def _spend(self, count: int) -> None:
        """Counts bytes that calls build. Raises ValueError where they are many times those of the file."""
        self._left -= count
        if self._left < 0:
            raise ValueError(f"it would fill much more memory than its {self._size:,} bytes")

    def find_class(self, module: str, name: str) -> Any:
        if (full := f"{module}.{name}") not in ALLOWED:
            raise pickle.UnpicklingError(
                f"it names {full}; nothing in it was run; if you trust the file, load it where it was made and pickle "
                "its weights again as a dict of NumPy arrays"
            )
        return _StandIn(full, self._spend)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        _scan(file, path, size)
        file.seek(0)
        tree = _Unpickler(file, size).load()
    if not isinstance(tree, dict):
        raise TypeError(f"{type(tree).__name__} where a map was expected")
    flat: dict[str, _Array] = {}
    _flatten(tree, "", flat, set())
    del tree
    # One buffer may stand under many names.
    if (total := sum(len(array.raw) for array in flat.values())) > MOST_BYTES * size:
        raise ValueError(f"{total:,} bytes of arrays in a file of {size:,}")
    outer = "params/" if all(name.startswith("params/") for name in flat) else ""
    # Popped, so that what was read goes as the tensors come.
    return {name.removeprefix(outer): flat.pop(name).tensor() for name in list(flat)}


def _scan(file: BinaryIO, path: Path, size: int) -> None:
    """Refuses a truncated pickle, and one for whose memo the unpickler would reserve more places than it has bytes."""
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("PUT", "LONG_BINPUT") and (argument or 0) > size:
                raise TypeError(f"memo entry {argument:,}")
    except ValueError as error:
        if any(sign in str(error) for sign in ("exhausted before", "remain", "not enough data")):
            raise UserError(f"{path}: {TRUNCATED}") from None
        raise


def _flatten(tree: Mapping[Any, Any], prefix: str, flat: dict[str, _Array], seen: set[int]) -> None:
    """Puts the arrays of a map of maps into `flat`, their names joined by "/"."""
    if id(tree) in seen:
        # It may hold itself, or double at each of many levels.
        raise ValueError("the same map in two places")
    seen.add(id(tree))
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TypeError("keys are not all text")
        if len(name := f"{prefix}{key}") > WINDOW:
            raise ValueError(f"a name of more than {WINDOW} letters")
        if isinstance(value, dict):
            _flatten(value, f"{name}/", flat, seen)
        elif isinstance(value, _Array) and value.shape is not None:
            flat[name] = value
        else:
            raise TypeError(f"{type(value).__name__} where an array was expected")

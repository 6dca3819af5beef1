"""A client of `lapa serve`, without torch: observations go to the server, chunks of actions come back.

    pip install lapa-client                       # on a robot's computer: NumPy, msgpack and websockets, nothing else

    from lapa_client import PolicyClient          # the same file in lapa itself: from lapa.serve.client import ...

    with PolicyClient("ws://192.168.1.5:8000", api_key="...") as client:
        actions_KA = client.infer({"front": image_HWC, "instruction": "open the drawer", "state": [0.1, 0.2]})

The protocol is that of openpi (https://github.com/Physical-Intelligence/openpi): a websocket, one msgpack map for each
message, arrays as maps of bytes, dtype and shape. The server sends its metadata first, then answers each map with a map
that has `actions` and `server_timing`, or with one line of text, which is an error. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
import re
from typing import Any

try:
    import msgpack
    import numpy as np
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'{error.name} is missing; install it: pip install "lapa-vla[serve]", or lapa-client on a robot\'s computer',
        name=error.name,
    ) from error

# Bounds of a message: its bytes, its values in lists and maps, the length of one list, and how deep they are nested.
MAX_BYTES = 64 * 2**20
MAX_VALUES = 1_000_000
MAX_LIST = 4096
MAX_DEPTH = 8
MAX_AXES = 8
# The dtypes that travel: booleans, whole numbers, floats; never objects, records or text.
DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")


def pack(value: Any) -> bytes:
    """Returns the msgpack form of maps, lists, texts, numbers and arrays (NumPy's, or whatever NumPy reads as one).

    Raises ValueError for anything else, arrays of objects, records or text included.
    """
    try:
        return msgpack.packb(value, default=_pack_array)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"cannot be sent: {error}") from error


def unpack(data: bytes, max_bytes: int = MAX_BYTES) -> dict[Any, Any]:
    """Returns the map that `data` holds; its arrays are writable and have the byte order of this machine.

    Raises ValueError with one line where `data` is not a msgpack map, is larger than `max_bytes`, holds an array whose
    dtype, shape and bytes do not agree, or has more values or is nested deeper than the bounds of this module.
    """
    if len(data) > max_bytes:
        raise ValueError(f"a message of {len(data)} bytes is larger than the bound of {max_bytes}")
    count = 0

    def checked(values: Any) -> Any:
        nonlocal count
        count += len(values)
        if count > MAX_VALUES:
            raise ValueError(f"a message of more than {MAX_VALUES} values; send images as arrays")
        return _unpack_array(values) if isinstance(values, dict) else values

    try:
        message = msgpack.unpackb(
            data,
            object_hook=checked,
            list_hook=checked,
            ext_hook=_refuse_extension,
            max_array_len=MAX_LIST,
            max_map_len=MAX_LIST,
        )
    except (ValueError, msgpack.UnpackException) as error:
        reason = (
            " ".join(str(error).split()) or f"{type(error).__name__} of msgpack: cut, not msgpack or nested too deep"
        )
        raise ValueError(f"malformed message: {reason}") from error
    if not isinstance(message, dict):
        raise ValueError(f"expected a map, got {type(message).__name__}")
    _check_plain(message, MAX_DEPTH)
    return message


def _pack_array(value: Any) -> dict[bytes, Any]:
    """Returns the map that stands for an array or a NumPy scalar."""
    if not (hasattr(value, "__array__") or hasattr(value, "__array_interface__")):
        raise ValueError(f"{type(value).__name__} is no number, text, list, map or array")
    scalar = isinstance(value, np.generic)
    array = np.asarray(value)
    if not DTYPE.fullmatch(array.dtype.str):
        raise ValueError(f"arrays of dtype {array.dtype} are not sent, only booleans, whole numbers and floats")
    if scalar:
        return {b"__npgeneric__": True, b"data": array.item(), b"dtype": array.dtype.str}
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def _unpack_array(values: dict[Any, Any]) -> Any:
    """Returns the array or NumPy scalar that a map stands for; any other map as it is."""
    if b"__ndarray__" not in values and b"__npgeneric__" not in values:
        return values
    dtype, data, shape = values.get(b"dtype"), values.get(b"data"), values.get(b"shape")
    if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
        raise ValueError(f"an array of dtype {dtype!r:.40}; only booleans, whole numbers and floats are taken")
    kind = np.dtype(dtype).newbyteorder("=")
    if b"__npgeneric__" in values:
        if not isinstance(data, (bool, int, float)):
            raise ValueError(f"a NumPy scalar whose data is {type(data).__name__}, expected a number")
        try:
            return kind.type(data)
        except OverflowError as error:
            raise ValueError(f"{data!r:.40} does not fit into dtype {dtype}") from error
    if not isinstance(data, bytes):
        raise ValueError(f"an array whose data is {type(data).__name__}, expected bytes")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise ValueError(f"an array of shape {shape!r:.60}; expected a list of whole numbers")
    if len(shape) > MAX_AXES:
        raise ValueError(f"an array of {len(shape)} axes; at most {MAX_AXES} are taken")
    if math.prod(shape) * kind.itemsize != len(data):
        raise ValueError(f"an array of shape {shape} and dtype {dtype} does not have {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape).astype(kind)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"an extension of type {code}; expected maps, lists, texts, numbers and arrays")


def _check_plain(value: Any, depth: int) -> None:
    """Raises ValueError where a message is nested too deep, or holds a value of msgpack's own types."""
    if isinstance(value, (dict, list)):
        if depth == 0:
            raise ValueError(f"a message that is nested deeper than {MAX_DEPTH} levels")
        for item in value.values() if isinstance(value, dict) else value:
            _check_plain(item, depth - 1)
    elif isinstance(value, msgpack.Timestamp):
        _refuse_extension(-1, b"")

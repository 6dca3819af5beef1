"""A client of `lapa serve`, without torch: observations go to the server, chunks of actions come back.

    pip install ./packages/lapa-client            # on a robot's computer: NumPy, msgpack and websockets, nothing else

    from lapa_client import PolicyClient          # the same file in lapa itself: from lapa.serve.client import ...

    with PolicyClient("ws://192.168.1.5:8000", api_key="...") as client:
        actions_KA = client.infer({"front": image_HWC, "instruction": "open the drawer", "state": [0.1, 0.2]})

The protocol is that of openpi (https://github.com/Physical-Intelligence/openpi): a websocket, one msgpack map for each
message, arrays as maps of bytes, dtype and shape. The server sends its metadata first, then answers each map with a map
that has `actions` and `server_timing`, or with one line of text, which is an error. Nothing is ever unpickled.
"""

from __future__ import annotations

import logging
import math
import random
import re
import socket
import threading
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any

try:
    import msgpack
    import numpy as np
    from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
    from websockets.sync.client import ClientConnection, connect
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

# The first word of a server's line where its queue is full.
BUSY = "busy"
# Seconds between two attempts to connect: from the first to the last they double, and each varies by up to a half.
FIRST_PAUSE, LAST_PAUSE = 0.1, 5.0
# The codes (RFC 6455) with which a server closes because it goes; with any other it refuses a message.
GONE = (1000, 1001, 1005, 1006, 1011, 1012, 1013, 1014)

log = logging.getLogger(__name__)


class ServerError(RuntimeError):
    """The server refuses a request, or this client; the message is the server's own line."""


class ServerBusyError(ServerError):
    """The server's queue is full: ask again a little later."""


class ServerLateError(TimeoutError):
    """The server is there, but has not answered in time."""


class ServerUnreachableError(ConnectionError):
    """There was no server for as long as this client tries to reach one."""


class PolicyClient:
    """A policy behind `lapa serve`, or behind another server of openpi's protocol.

    url is ws://HOST:PORT (wss:// with TLS) or HOST:PORT; api_key is the key that the server's --api-key-file holds.
    `timeout` bounds the wait for one answer, in seconds. Where the server is gone or not there yet, a call tries again
    for `reconnect_for` seconds, with growing pauses, and then raises ServerUnreachableError.

    A connection is one session of the server. A new connection is a new session, as after `reset`. Threads may share a
    client; their calls then follow one another in the same session.
    """

    def __init__(
        self, url: str, api_key: str | None = None, *, timeout: float = 10.0, reconnect_for: float = 30.0
    ) -> None:
        scheme, _, rest = url.rpartition("://")
        self.url = {"": "ws", "http": "ws", "https": "wss"}.get(scheme, scheme) + "://" + rest
        self.timeout, self.reconnect_for = timeout, reconnect_for
        self._headers = {"Authorization": f"Api-Key {api_key.strip()}"} if api_key else {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._connection: ClientConnection | None = None
        self._connected = ExitStack()
        self._metadata: dict[str, Any] = {}
        self._timing: dict[str, Any] = {}
        self._request(None)

    @property
    def metadata(self) -> dict[str, Any]:
        """Returns what the server sent about its policy when this client last connected: cameras, chunk, fps, ..."""
        return self._metadata

    @property
    def server_timing(self) -> dict[str, Any]:
        """Returns the server's own times of the last answered call, in ms; empty where it sends none."""
        return self._timing

    def infer(self, observation: dict[str, Any]) -> np.ndarray:
        """Returns the actions for an observation: a chunk [K, A], or one action [A] where the server sends one.

        observation: images [H, W, 3] under the server's cameras or keys, "instruction" or "prompt", and "state" (an
        array or a list) where the policy reads one.

        Raises ValueError where it cannot be sent, ServerError (ServerBusyError) where the server refuses it,
        ServerLateError without an answer in time, and ServerUnreachableError.
        """
        answer = self._request(_packed(observation))
        if not isinstance(answer.get("actions"), (np.ndarray, list)):
            raise ServerError(f"{self.url} sent no actions, but {sorted(map(str, answer))}")
        self._timing = answer.get("server_timing") or {}
        return np.asarray(answer["actions"])

    def reset(self) -> None:
        """Begins a new episode: the server forgets what it keeps of this session. Raises as `infer` does."""
        self._request(pack({"reset": True}))

    def close(self) -> None:
        """Closes the connection. A call of another thread raises ServerUnreachableError, as does any later one."""
        self._closed.set()
        self._disconnect()
        with self._lock:
            self._disconnect()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, request: bytes | None) -> dict[str, Any]:
        """Returns the answer to a packed request, or an empty map to None, which only connects.

        While the server is gone, connects again and sends the request again.
        """
        with self._lock:
            deadline, pause = time.monotonic() + self.reconnect_for, FIRST_PAUSE
            while True:
                try:
                    if self._closed.is_set():
                        raise ServerUnreachableError(f"this client of {self.url} is closed")
                    connection = self._connection or self._connect()
                    return {} if request is None else self._exchange(connection, request)
                except (ServerLateError, ServerUnreachableError):
                    raise
                except (OSError, InvalidHandshake, ConnectionClosed) as error:
                    self._disconnect()
                    reason = self._gone(error)
                wait = pause * random.uniform(0.5, 1.5)
                pause = min(2 * pause, LAST_PAUSE)
                if time.monotonic() + wait > deadline:
                    raise ServerUnreachableError(f"{self.url} is not reached within {self.reconnect_for:g} s: {reason}")
                log.warning("%s is not reached, next attempt in %.1f s: %s", self.url, wait, reason)
                self._closed.wait(wait)

    def _connect(self) -> ClientConnection:
        """Opens a connection and reads the metadata that a server sends first."""
        options: dict[str, Any] = {"open_timeout": self.timeout, "close_timeout": 1, "max_size": MAX_BYTES}
        try:
            context = connect(self.url, additional_headers=self._headers, compression=None, **options)
        except (InvalidURI, ValueError) as error:
            raise ValueError(f"{self.url!r} is not an address of a server; expected ws://HOST:PORT") from error
        connection = self._connected.enter_context(context)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # A send over a network that is gone would otherwise wait for a quarter of an hour.
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * self.timeout))
        try:
            self._metadata = self._receive(connection)
        except ServerError:
            self._disconnect()
            raise
        self._connection = connection
        return connection

    def _disconnect(self) -> None:
        self._connection = None
        self._connected.close()

    def _exchange(self, connection: ClientConnection, request: bytes) -> dict[str, Any]:
        connection.send(request)
        return self._receive(connection)

    def _receive(self, connection: ClientConnection) -> dict[str, Any]:
        """Returns the map of the next message. Raises ServerError for a line of text, and keeps the connection then."""
        try:
            answer = connection.recv(self.timeout)
        except BaseException as error:
            # A later answer on this connection would be taken for that of the next request.
            self._disconnect()
            if isinstance(error, TimeoutError):
                raise ServerLateError(f"{self.url} has not answered within {self.timeout:g} s") from error
            raise
        if isinstance(answer, str):
            raise (ServerBusyError if answer.lower().startswith(BUSY) else ServerError)(answer)
        try:
            return unpack(answer)
        except ValueError as error:
            raise ServerError(f"{self.url} sent a message of another protocol: {error}") from error

    def _gone(self, error: Exception) -> str:
        """Returns why the server is not there. Raises ServerError where it is there and refuses this client."""
        if isinstance(error, InvalidStatus) and error.response.status_code < 500:
            line = bytes(error.response.body or b"").decode(errors="replace").strip().partition("\n")[0][:200]
            raise ServerError(f"{self.url} refuses this client: {line or error}") from error
        if isinstance(error, ConnectionClosed) and error.rcvd is not None and error.rcvd.code not in GONE:
            raise ServerError(f"{self.url} refuses a message: {error.rcvd.reason or error}") from error
        return str(error) or type(error).__name__


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


def _packed(observation: dict[str, Any]) -> bytes:
    """Returns an observation as bytes. Raises ValueError that names the entry which cannot be sent."""
    if not isinstance(observation, dict):
        raise ValueError(f"an observation is a dict of images, texts and numbers, not {type(observation).__name__}")
    parts = [msgpack.Packer().pack_map_header(len(observation))]
    for name, value in observation.items():
        try:
            parts += [pack(name), pack(value)]
        except ValueError as error:
            raise ValueError(f"{name!r} of the observation {error}") from error
    return b"".join(parts)


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

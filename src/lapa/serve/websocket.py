"""uvicorn's websocket, with bounds of a message and of all messages together that do not end a connection.

    uvicorn.Config(app, ws=functools.partial(BoundedWebSocket, most=2**26, budget=Budget(2**29)))

The header of a frame has its length (https://datatracker.ietf.org/doc/html/rfc6455#section-5.2). Where a message would
grow above the bound of one, or above what all clients together may hold, its frames are read and forgotten, and the
application receives {"type": "websocket.receive", "refused": error} in place of the message.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from lapa.errors import UserError
from lapa.serve.batching import Busy

# Frames of one message: a browser sends one for each 128 kB, clients of robots one in all.
MOST_FRAMES = 4096
CONTINUATION, BINARY = 0, 2
MOST_CONTROL = 125
# Bits of the first two bytes of a frame; the lengths that stand for a longer one, and its bytes.
RESERVED, OPCODE, MASKED, LENGTH = 0x70, 0x0F, 0x80, 0x7F
LONGER = {126: 2, 127: 8}


class Budget:
    """Bytes that messages of all clients hold together; `take` raises Busy above `most`."""

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0

    def take(self, size: int) -> None:
        if self.used + size > self.most:
            raise Busy(f"messages of {self.used} bytes are answered already")
        self.used += size

    def give_back(self, size: int) -> None:
        self.used -= size


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """A connection. most: bytes of a message; budget: what all connections share."""

    def __init__(self, *arguments: Any, most: int, budget: Budget, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._most, self._budget = most, budget
        # Bytes taken from the budget, and those of the message that the application answers.
        self._held, self._answered = 0, 0
        # Of the frame that arrives: its header as far as it is there, the bytes to come, whether they are kept.
        self._header, self._left, self._kept = b"", 0, True
        # Of the message that arrives: its bytes and frames so far, and why it is refused.
        self._size, self._num_frames = 0, 0
        self._refused: UserError | Busy | None = None

    def data_received(self, data: bytes) -> None:
        if not self.handshake_initiated:
            super().data_received(data)
            return
        received, self._header = memoryview(self._header + data), b""
        while received and not self.transport.is_closing():
            if not self._left:
                size = _header_size(received)
                if len(received) < size:
                    self._header = bytes(received)
                    return
                header, received = bytes(received[:size]), received[size:]
                super().data_received(self._begun(header))
            payload, received = received[: self._left], received[self._left :]
            self._left -= len(payload)
            if payload and self._kept:
                super().data_received(bytes(payload))

    def send_receive_event_to_app(self) -> None:
        if self._refused is None or self.close_sent:
            super().send_receive_event_to_app()
            return
        self.frames = []
        event: Any = {"type": "websocket.receive", "refused": self._refused}
        self.queue.put_nowait(event)
        self.read_paused = True
        self.transport.pause_reading()

    async def receive(self) -> Any:
        self._release(self._answered)
        event: Any = await super().receive()
        self._answered = len(event.get("bytes") or event.get("text", "").encode())
        return event

    def pause_writing(self) -> None:
        # A client that sends pings and reads no reply is not read on.
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.read_paused:
            self.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._release(self._held - self._answered)
        super().connection_lost(exc)

    async def run_asgi(self) -> None:
        try:
            await super().run_asgi()
        finally:
            # A client may be gone while its message is still answered.
            self._release(self._answered)
            self._answered = 0

    def _begun(self, header: bytes) -> bytes:
        """Begins a frame. Returns its header, or that of an empty frame where its content is not kept."""
        first, mask = header[0], header[1] & MASKED
        self._left = header[1] & LENGTH
        num_bytes = LONGER.get(self._left, 0)
        if num_bytes:
            self._left = int.from_bytes(header[2 : 2 + num_bytes])
        if (opcode := first & OPCODE) <= BINARY:
            self._kept = self._grows(new=opcode != CONTINUATION)
        else:
            self._kept = self._left <= MOST_CONTROL
            # uvicorn refuses a frame with these bits, as it would this one at its end.
            first |= 0 if self._kept else RESERVED
        return header if self._kept else bytes([first, mask]) + header[2 + num_bytes :]

    def _grows(self, new: bool) -> bool:
        """Whether the message, a new one or that of the frames before, is kept with the frame that begins."""
        if new:
            self._size, self._num_frames, self._refused = 0, 0, None
        if self._refused is not None:
            # uvicorn keeps each frame until the last, empty ones too.
            self.frames = []
            return False
        self._num_frames += 1
        try:
            if self._size + self._left > self._most:
                raise UserError(f"a message of more than {self._most} bytes (--max-message-mib)")
            if self._num_frames > MOST_FRAMES:
                raise UserError(f"a message of more than {MOST_FRAMES} frames")
            self._budget.take(self._left)
        except (UserError, Busy) as error:
            self._refused, self.frames = error, []
            self._release(self._size)
            return False
        self._size += self._left
        self._held += self._left
        return True

    def _release(self, size: int) -> None:
        size = min(size, self._held)
        self._held -= size
        self._budget.give_back(size)


def _header_size(frame: memoryview) -> int:
    """Returns the bytes of a frame's header, as far as is known from them."""
    if len(frame) < 2:
        return 2
    return 2 + LONGER.get(frame[1] & LENGTH, 0) + (4 if frame[1] & MASKED else 0)

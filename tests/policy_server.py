"""A made-up policy server of openpi's protocol, for tests of the client and of the control loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from lapa.serve.client import pack, unpack


class FakeServer:
    """Sends metadata, and for each message what `answer(message)` returns: a map, a line of text, or bytes as they are.

    It runs in threads, with a session for each connection, and takes messages of up to 1 MiB.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Any],
        port: int = 0,
        key: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.connections = 0
        self._open: set[ServerConnection] = set()

        def session(connection: ServerConnection) -> None:
            self.connections += 1
            self._open.add(connection)
            connection.send(pack({"fps": 10.0, "chunk": 2} if metadata is None else metadata))
            for message in connection:
                assert isinstance(message, bytes)
                reply = answer(unpack(message))
                connection.send(pack(reply) if isinstance(reply, dict) else reply)

        def admit(connection: ServerConnection, request: Request) -> Response | None:
            if key is None or request.headers.get("Authorization") == f"Api-Key {key}":
                return None
            return connection.respond(401, "the key is missing or wrong\n")

        options: dict[str, Any] = {"compression": None, "max_size": 2**20, "close_timeout": 1}
        self._server = serve(session, "127.0.0.1", port, process_request=admit, **options)
        self.port = self._server.socket.getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        # Older releases of websockets leave open what is connected.
        for connection in self._open:
            connection.close(1001)
        self._thread.join()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

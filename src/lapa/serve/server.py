"""A policy behind one port, for the clients that robots run: openpi's websocket, OpenVLA's REST, and a page.

    lapa serve POLICY
    lapa serve POLICY --map libero --port 8000
    lapa serve POLICY --host 0.0.0.0 --api-key-file key.txt --ensemble 0.01

/           websocket: msgpack maps with arrays; metadata first, then a reply to each observation. For a browser: a page
/act        POST, OpenVLA's: {"image": json_numpy array, "instruction": text} -> one action
/infer      POST, the content of the websocket as JSON -> {"actions": K lists of A numbers, "server_timing": {...}}
/healthz    OK
/metadata   what the policy expects, as JSON
/status     counts, latencies and the last observation, as JSON

An error is one line: a text message on the websocket, which lives on, or the body of a response. A connection of the
websocket has a state of its own (chunk, ensemble), which {"reset": true} forgets; REST has none.

Axes: K action chunk, A action dimensions.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import math
import shlex
import socket
import stat
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from lapa.config import require_at_least
from lapa.console import console, say
from lapa.errors import UserError
from lapa.policy.runtime import Actor, Policy, load_actors
from lapa.serve.config import LEAST_IMAGE, ServeConfig

try:
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, HTTPConnection, Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect

    from lapa import web
    from lapa.serve.batching import Busy
    from lapa.serve.client import pack
    from lapa.serve.protocols import parse_body, to_json
    from lapa.serve.service import Service, Session, TooLarge
    from lapa.serve.websocket import BoundedWebSocket, Budget
    from lapa.web import line
except ModuleNotFoundError as error:
    if (error.name or "").startswith("lapa"):
        raise
    raise UserError(f"lapa serve needs {error.name}; install it: pip install 'lapa-vla[serve]'") from None

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

# What a client without the key may see.
OPEN_PATHS = ("/", "/healthz")
PAGE = Path(__file__).with_name("page.html")
LONGEST_KEY = 4096
# Clients of the websocket at once, and bytes that the messages and bodies of all hold together, or one largest message.
MAX_CLIENTS = 64
MOST_HELD = 2**29
BODY_SECONDS, DRAIN_SECONDS, SUMMARY_SECONDS = 30.0, 30.0, 60.0


def run(config: ServeConfig) -> None:
    """`lapa serve`: answers requests until SIGTERM or Ctrl-C, then finishes those that run.

    Raises UserError on bad options, a policy that cannot act and a port in use, and KeyboardInterrupt after Ctrl-C.
    """
    check(config)
    key = None if config.api_key_file is None else read_key(config.api_key_file)
    with _listening(config) as listener:
        server = Server(Service(load_actors(config.policy, config.device), config), listener, key)
        interrupted = asyncio.run(web.until_a_signal(server, lambda: _announce(server)))
    say(f"served {server.service.figures.requests} requests")
    if interrupted:
        raise KeyboardInterrupt


@contextlib.contextmanager
def running(policy: Actor | Path | str, *, api_key: str | None = None, **options: Any) -> Iterator[str]:
    """Serves a policy in a thread while the block runs, and yields the server's URL, such as http://127.0.0.1:8000.

    policy: one that is loaded, or its folder. options: fields of ServeConfig; the port is a free one by default.
    Raises UserError as `run` does.
    """
    folder = Path("policy" if isinstance(policy, Actor) else policy)
    config = ServeConfig(**{"policy": folder, "port": 0, **options})
    check(config)
    with _listening(config) as listener:
        if isinstance(policy, Policy):
            actors: dict[str, Actor] = {**policy.by_statistics()}
        else:
            actors = {"": policy} if isinstance(policy, Actor) else load_actors(folder, config.device)
        server = Server(Service(actors, config), listener, api_key.encode() if api_key else None)
        with web.in_thread(server) as url:
            yield url


def check(config: ServeConfig) -> None:
    """Raises UserError for options that cannot be meant."""
    least = {"max_batch": 1, "max_queue": 1, "max_message_mib": 1, "max_image": LEAST_IMAGE, "max_instruction": 1}
    require_at_least(config, steps_per_call=1, batch_window_ms=0, **least)
    web.require_port(config.port)
    if config.ensemble is not None and not math.isfinite(config.ensemble):
        raise UserError(f"--ensemble must be a finite number, got {config.ensemble}")
    if not math.isfinite(config.batch_window_ms):
        raise UserError(f"--batch-window-ms must be a finite number, got {config.batch_window_ms}")
    if config.ensemble is not None and config.reply == "chunk":
        raise UserError("--ensemble averages chunks into one action: leave out --reply chunk")


def read_key(path: Path) -> bytes:
    """Returns the key in a file of one line. Raises UserError where others can read the file, or it holds no key."""
    name = shlex.quote(str(path))
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(f"{path}: others can read the key; run: chmod 600 {name}")
        with path.open("rb") as file:
            key = file.read(LONGEST_KEY + 1).strip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not key:
        raise UserError(f"{path}: empty; write a key into it: openssl rand -hex 32 > {name}")
    if len(key) > LONGEST_KEY or not all(33 <= byte <= 126 for byte in key):
        raise UserError(f"{path}: a key is one line of ASCII without blanks; write one: openssl rand -hex 32 > {name}")
    return key


def _listening(config: ServeConfig) -> contextlib.AbstractContextManager[socket.socket]:
    """A socket that listens at the address of a config. Raises UserError where it is in use or not this machine's."""
    where = f"--host {config.host} --port {config.port}"
    return web.listening(config.host, config.port, where, f"{web.ADDRESS}, or an address of this machine")


class Server(web.Server):
    """A service on a listening socket, over HTTP and websockets. key: what clients must send, if anything."""

    def __init__(self, service: Service, listener: socket.socket, key: bytes | None) -> None:
        super().__init__(listener)
        self.service, self.key = service, key
        self._most = service.config.max_message_mib * 2**20
        self._budget = Budget(max(self._most, MOST_HELD))
        self.options = {
            "ws": partial(BoundedWebSocket, most=self._most, budget=self._budget),
            "ws_max_size": self._most,
            "ws_per_message_deflate": False,
        }
        self.host = ipaddress.ip_address(listener.getsockname()[0])
        self._app = Starlette(
            routes=[
                WebSocketRoute("/", self.websocket),
                WebSocketRoute("/{elsewhere:path}", self.nowhere),
                Route("/", self.page),
                Route("/healthz", lambda request: PlainTextResponse("OK")),
                Route("/metadata", lambda request: JSONResponse(service.metadata)),
                Route("/status", self.status),
                Route("/act", self.act, methods=["POST"]),
                Route("/infer", self.infer, methods=["POST"]),
            ]
        )

    def work(self) -> Iterable[Coroutine[Any, Any, None]]:
        return self.service.batcher.run(), self._summaries()

    async def begin(self) -> None:
        await self.service.warm_up()

    async def finish(self) -> None:
        self.service.stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while self.service.num_running:
                    await asyncio.sleep(0.01)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application: a request goes on to its route, unless its client may not ask."""
        if refusal := self._refusal(HTTPConnection(scope)):
            if scope["type"] == "websocket":
                await WebSocket(scope, receive, send).send_denial_response(refusal)
            else:
                await refusal(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            self.service.complaint(error, _address(HTTPConnection(scope)))

    async def websocket(self, connection: WebSocket) -> None:
        """One client, from its connection to its end."""
        sessions = self.service.sessions
        if len(sessions) >= MAX_CLIENTS:
            return await connection.send_denial_response(line(f"busy: {MAX_CLIENTS} clients are connected", 503))
        session = Session(_address(connection))
        await connection.accept()
        sessions.add(session)
        say(f"{session.client} connected ({len(sessions)} now)")
        try:
            await connection.send_bytes(pack(self.service.metadata))
            while (event := await connection.receive())["type"] != "websocket.disconnect":
                with self.service.counted():
                    reply = await self.service.reply(session, event.get("refused") or event.get("bytes"))
                    await (connection.send_text(reply) if isinstance(reply, str) else connection.send_bytes(reply))
        except WebSocketDisconnect:
            pass
        finally:
            sessions.discard(session)
            say(f"{session.client} disconnected after {session.num_requests} requests")

    async def nowhere(self, connection: WebSocket) -> None:
        await connection.send_denial_response(line("error: the websocket is at /", 404))

    async def page(self, request: Request) -> Response:
        html = PAGE.read_text(encoding="utf-8")
        return HTMLResponse(html, headers=web.page_headers(html))

    async def status(self, request: Request) -> Response:
        return JSONResponse(await self.service.status())

    async def act(self, request: Request) -> Response:
        """OpenVLA's: the first action of the chunk, as json_numpy's array; as text of it where the request was."""
        return await self._answered(request, lambda actions_KA, timing: to_json(actions_KA[0]))

    async def infer(self, request: Request) -> Response:
        """The whole chunk as lists."""
        return await self._answered(
            request, lambda actions_KA, timing: {"actions": actions_KA.tolist(), "server_timing": timing}
        )

    async def _answered(self, request: Request, form: Callable[[np.ndarray, dict[str, Any]], Any]) -> Response:
        """The response to an observation in JSON, whose content `form` makes of the chunk and the timing."""
        client, encoded = _address(request), False
        try:
            async with self._body(request) as body:

                def read() -> dict[str, Any]:
                    nonlocal encoded
                    message, encoded = parse_body(body)
                    return message

                with self.service.counted():
                    content = form(*await self.service.chunk(client, len(body), read))
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception as error:
            return line(*self.service.complaint(error, client))
        return JSONResponse(json.dumps(content) if encoded else content)

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """A bounded body, which is held while the context lasts.

        Raises UserError where it is too large, too slow or compressed, and Busy where the messages of all clients
        together are too large.
        """
        if request.headers.get("content-encoding", "identity") != "identity":
            raise UserError("compressed bodies are not read; send it as it is")
        declared = int(request.headers.get("content-length", self._most))
        held = 0 if declared > self._most else declared
        try:
            self._budget.take(held)
        except Busy:
            await _read(request, 0)
            raise
        try:
            # h11 lets no body exceed the length that it declares.
            body, size = await _read(request, held)
            if size > self._most:
                raise TooLarge(f"a body of {size} bytes; at most {self._most} (--max-message-mib)")
            yield body
        finally:
            self._budget.give_back(held)

    def _refusal(self, connection: HTTPConnection) -> Response | None:
        """The response to a client that may not ask: a page of another site, or one without the key."""
        # A site could give its own name this machine's address; with a key that is of no use to it.
        if refusal := web.refusal(connection, local=self.host.is_loopback and self.key is None):
            return refusal
        if self.key is None or (connection.scope["type"] == "http" and connection.scope["path"] in OPEN_PATHS):
            return None
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), self.key)
        if right and scheme.lower() in ("api-key", "bearer"):
            return None
        return line("error: wrong or no key; send the header Authorization: Api-Key KEY", 401)

    async def _summaries(self) -> None:
        """Prints counts and latencies each minute in which there were requests."""
        before = 0
        while True:
            await asyncio.sleep(SUMMARY_SECONDS)
            if self.service.figures.requests > before:
                say(self.service.summary(SUMMARY_SECONDS))
            before = self.service.figures.requests


def _announce(server: Server) -> None:
    """Prints what is served and where, what a message must have, and how to try it."""
    service, url, metadata = server.service, server.url, server.service.metadata
    rate = f" at {metadata['fps']:g} fps" if metadata["fps"] else ""
    actions = f"{metadata['reply_steps']} x {metadata['action_dim']} actions{rate}"
    say(f"{service.config.policy}: replies with {actions}, on {metadata['device']}")
    say(f"expects: {service.keys.wanted()}")
    if len(keys := metadata["statistics_keys"]) > 1:
        say(f"statistics of {', '.join(keys)}: unnorm_key chooses (default: {metadata['statistics_key'] or 'none'})")
    others = f" (from other machines {socket.gethostname()})" if server.host.is_unspecified else ""
    what = f"{others}: websocket, REST, and a page for the browser"
    console.print(Text.assemble("at ", (url, "bold"), what), soft_wrap=True)
    if not server.host.is_loopback and server.key is None:
        text = (
            f"warning: whoever reaches {server.host} can ask the policy and see its last image; "
            "give --api-key-file, or leave out --host"
        )
        console.print(Text(text, "bold yellow"), soft_wrap=True)
    header = "" if server.key is None else "-H 'Authorization: Api-Key KEY' "
    say(f"try: curl {header}{url}/metadata")


async def _read(request: Request, most: int) -> tuple[bytes, int]:
    """`web.read_body`. Raises UserError where the body is too slow."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await web.read_body(request, most)
    except TimeoutError:
        raise UserError(f"the body did not arrive within {BODY_SECONDS:g} s") from None


def _address(connection: HTTPConnection) -> str:
    client = connection.client
    return "unknown" if client is None else f"{client.host}:{client.port}"

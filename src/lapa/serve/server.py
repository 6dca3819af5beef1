"""A policy behind one port, for the clients that robots run: openpi's websocket, OpenVLA's REST, and a page.

    lapa serve POLICY
    lapa serve POLICY --map libero --port 8000
    lapa serve POLICY --host 0.0.0.0 --api-key-file key.txt --ensemble 0.01

    /           websocket: msgpack maps with arrays; metadata first, then an answer to each observation. Without a
                websocket: a page for people
    /act        POST, OpenVLA's: {"image": json_numpy array, "instruction": text} -> one action
    /infer      POST, the websocket's content as JSON -> {"actions": K lists of A numbers, "server_timing": {...}}
    /healthz    OK        /metadata   what the policy expects, as JSON        /status   latencies, the last observation

An error is one line, a text message of the websocket, which lives on, or the body of a response. A connection of the
websocket has a state of its own (chunk, ensemble), which {"reset": true} forgets; REST has none.

Axes: K action chunk, A action dimensions, S state dimensions.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import io
import ipaddress
import json
import math
import shlex
import signal
import socket
import stat
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from rich.text import Text

from lapa import __version__
from lapa.config import require_at_least
from lapa.console import console, say
from lapa.errors import UserError, out_of_memory, printable, unknown
from lapa.policy.execution import Execution, RecedingHorizon, TemporalEnsemble
from lapa.policy.runtime import Actor, Policy, load_actors
from lapa.serve.config import ServeConfig
from lapa.types import Observation

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, HTTPConnection, Request
    from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect

    from lapa.serve.batching import Answer, Batcher, Busy
    from lapa.serve.client import pack, unpack
    from lapa.serve.protocols import KeyMap, parse_body, to_json
except ModuleNotFoundError as error:
    if (error.name or "").startswith("lapa"):
        raise
    raise UserError(f"lapa serve needs {error.name}; install it: pip install 'lapa-vla[serve]'") from None

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

PROTOCOL = 1
PAGE = Path(__file__).with_name("page.html")
# Only what is in the page itself runs, and no other site may frame it.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; frame-ancestors 'none'"
)
OPEN_PATHS = ("/", "/healthz")
# The least height and width of an image: no camera is that small.
LEAST_IMAGE = 8
# Clients of the websocket at once.
MAX_CLIENTS = 256
# A client is active, so that a batch waits for it, for this long after a request.
ACTIVE_SECONDS = 1.0
# Messages above this are read in other threads, so that they do not delay those of others.
LARGE_MESSAGE = 2**20
BODY_SECONDS, DRAIN_SECONDS, REPORT_SECONDS = 30.0, 30.0, 60.0
LATENCIES, SHOWN_LATENCIES, LATENCY_SECONDS, COUNTED_SECONDS = 20_000, 1000, 300.0, 10.0
LONGEST_ERROR = 600
THUMBNAIL = 320


def run(config: ServeConfig) -> None:
    """`lapa serve`: answers requests until SIGTERM or Ctrl-C, then finishes those that run.

    Raises UserError on bad options, a policy that cannot act and a port in use, and KeyboardInterrupt after Ctrl-C.
    """
    check(config)
    key = None if config.api_key_file is None else read_key(config.api_key_file)
    with listening(config) as listener:
        service = Service(load_actors(config.policy, config.device), config, key)
        interrupted = asyncio.run(_run(service, listener))
    say(f"served {service.figures.requests} requests")
    if interrupted:
        raise KeyboardInterrupt


@contextlib.contextmanager
def running(policy: Actor | Path | str, **options: Any) -> Iterator[str]:
    """Serves a policy in a thread while the block runs, and yields the server's URL, such as http://127.0.0.1:8000.

    policy: one that is loaded, or its folder. options: fields of ServeConfig; by default a free port, and `api_key`.
    """
    key = options.pop("api_key", None)
    name = "policy" if isinstance(policy, Actor) else str(policy)
    config = ServeConfig(**{"policy": Path(name), "port": 0, **options})
    check(config)
    actors = load_actors(name, config.device) if not isinstance(policy, Actor) else acting(policy)
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
    ready, failed = threading.Event(), []

    with listening(config) as listener:
        service = Service(actors, config, key.encode() if key else None)

        async def main() -> None:
            stop = asyncio.Event()
            started.append((asyncio.get_running_loop(), stop))
            await service.serve(listener, stop, ready.set)

        def target() -> None:
            try:
                asyncio.run(main())
            except BaseException as error:
                failed.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=target, name="server")
        thread.start()
        try:
            ready.wait()
            if failed:
                raise failed[0]
            yield url_of(listener)
        finally:
            if thread.is_alive():
                loop, stop = started[0]
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(stop.set)
            thread.join()


def check(config: ServeConfig) -> None:
    """Raises UserError for options that cannot be meant."""
    least = {"max_batch": 1, "max_queue": 1, "max_message_mib": 1, "max_image": LEAST_IMAGE, "max_instruction": 1}
    require_at_least(config, port=0, steps_per_call=1, batch_window_ms=0, **least)
    if config.port > 65535:
        raise UserError(f"--port must be at most 65535, got {config.port}")
    if config.ensemble is not None and not math.isfinite(config.ensemble):
        raise UserError(f"--ensemble must be a finite number, got {config.ensemble}")
    if not math.isfinite(config.batch_window_ms):
        raise UserError(f"--batch-window-ms must be a finite number, got {config.batch_window_ms}")
    if config.ensemble is not None and config.reply == "chunk":
        raise UserError("--ensemble averages chunks into one action: leave out --reply chunk")


def read_key(path: Path) -> bytes:
    """Returns the key in a file of one line. Raises UserError where others can read the file, or it holds no key."""
    try:
        mode = path.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(f"{path}: others can read the key; run: chmod 600 {shlex.quote(str(path))}")
        key = path.read_bytes().strip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not key:
        raise UserError(f"{path}: empty; write a key into it: openssl rand -hex 32 > {shlex.quote(str(path))}")
    if not all(33 <= byte <= 126 for byte in key):
        raise UserError(f"{path}: a key is one line of ASCII without blanks; write one: openssl rand -hex 32")
    return key


@contextlib.contextmanager
def listening(config: ServeConfig) -> Iterator[socket.socket]:
    """A socket bound to the address of a config. Raises UserError where that is in use or not this machine's."""
    where = f"--host {config.host} --port {config.port}"
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{where}: no such address ({error}); give an address of this machine") from None
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            # A second server could bind to a port on which nobody listens yet.
            listener.listen(128)
        except OSError as error:
            fix = "give another --port, or 0 for a free one" if config.port else "give an address of this machine"
            raise UserError(f"{where}: cannot listen there ({error.strerror}); {fix}") from None
        yield listener


def url_of(listener: socket.socket) -> str:
    """Returns the URL of a listening socket, for this machine's clients."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1" if listener.family == socket.AF_INET else "::1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def acting(policy: Actor) -> dict[str, Actor]:
    """Returns a policy as it acts with each of its statistics, by their key; without statistics under ""."""
    return {**policy.by_statistics()} if isinstance(policy, Policy) else {"": policy}


@dataclass(eq=False)
class Session:
    """A client of the websocket. plan: how chunks become actions, if single actions are asked for, under `key`."""

    client: str
    key: str | None = None
    plan: Execution | None = None
    last_request: float = -math.inf
    previous_ms: float | None = None
    num_requests: int = 0


@dataclass(eq=False)
class Figures:
    """Counts since the start, and the latest latencies: rows of unix time, total ms, infer ms, batch size."""

    started: float = field(default_factory=time.time)
    requests: int = 0
    busy: int = 0
    errors: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.zeros((LATENCIES, 4)))

    def add(self, total_ms: float, infer_ms: float, batch: int) -> None:
        self.rows[self.requests % LATENCIES] = time.time(), total_ms, infer_ms, batch
        self.requests += 1

    def since(self, moment: float) -> np.ndarray:
        """Rows since a unix time, oldest first."""
        first = self.requests % LATENCIES if self.requests >= LATENCIES else 0
        rows = np.roll(self.rows[: self.requests], -first, axis=0)
        return rows[rows[:, 0] >= moment]


class Service:
    """What answers requests. actors: the policy by the key of its statistics, as of `acting`; key: that of clients.

    Raises UserError where the options do not fit the policy.
    """

    def __init__(self, actors: Mapping[str, Actor], config: ServeConfig, key: bytes | None) -> None:
        self.actors, self.config, self.key = dict(actors), config, key
        known = [name for name in actors if name]
        if config.statistics_key is not None and config.statistics_key not in known:
            raise unknown("--statistics-key", config.statistics_key, known)
        self.statistics_key = config.statistics_key or (next(iter(actors)) if len(actors) == 1 else None)
        self.actor = self.actors[self.statistics_key or next(iter(actors))]
        self._check_fit()
        self.keys = KeyMap(self.actor.cameras, config.map, self.actor.state_dim)
        self.replies_actions = (config.reply or ("chunk" if config.ensemble is None else "action")) == "action"
        self.figures = Figures()
        self.sessions: set[Session] = set()
        self.loopback = False
        self.batcher = Batcher(
            self.actors, self._num_active, config.max_batch, config.batch_window_ms, config.max_queue
        )
        self._last: tuple[float, str, Observation, np.ndarray] | None = None
        self._recent: dict[str, float] = {}
        self._running = 0
        self._stopping = False
        self._last_complaint = -math.inf
        self.metadata = self._describe()
        routes = [
            WebSocketRoute("/", self.websocket),
            Route("/", self.page),
            Route("/healthz", lambda request: PlainTextResponse("OK")),
            Route("/metadata", lambda request: JSONResponse(self.metadata)),
            Route("/status", self.status),
            Route("/act", self.act, methods=["POST"]),
            Route("/infer", self.infer, methods=["POST"]),
        ]
        self.app: ASGIApp = self._guarded(Starlette(routes=routes))

    async def serve(self, listener: socket.socket, stop: asyncio.Event, ready: Callable[[], None]) -> None:
        """Answers requests at a socket until `stop` is set and those that run are answered. ready: called first."""
        self.loopback = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        server = _Uvicorn(
            uvicorn.Config(
                self.app,
                http="h11",
                ws="websockets-sansio",
                loop="asyncio",
                lifespan="off",
                ws_max_size=self.config.max_message_mib * 2**20,
                ws_per_message_deflate=False,
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=60,
                timeout_graceful_shutdown=5,
            )
        )
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work) for work in (self.batcher.run(), self._report())]
        try:
            await self._warm_up()
            web = asyncio.create_task(server.serve([listener]))
            stopped: asyncio.Task[Any] = asyncio.create_task(stop.wait())
            tasks += [web, stopped]
            while not server.started and not web.done():
                await asyncio.sleep(0.005)
            ready()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            self._stopping = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_SECONDS):
                    while self._running:
                        await asyncio.sleep(0.01)
            server.should_exit = True
            await web
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    # The websocket.

    async def websocket(self, socket: WebSocket) -> None:
        """One client, from its connection to its end."""
        if len(self.sessions) >= MAX_CLIENTS:
            return await socket.send_denial_response(_line(f"busy: {MAX_CLIENTS} clients are connected", 503))
        session = Session(_address(socket))
        await socket.accept()
        self.sessions.add(session)
        say(f"{session.client} connected ({len(self.sessions)} now)")
        try:
            await socket.send_bytes(pack(self.metadata))
            while (event := await socket.receive())["type"] != "websocket.disconnect":
                with self._counted():
                    reply = await self._reply(session, event.get("bytes"))
                    await (socket.send_text(reply) if isinstance(reply, str) else socket.send_bytes(reply))
        except WebSocketDisconnect:
            pass
        finally:
            self.sessions.discard(session)
            say(f"{session.client} disconnected after {session.num_requests} requests")
        return None

    async def _reply(self, session: Session, data: bytes | None) -> bytes | str:
        """The answer to a message: a packed map, or one line about what is wrong."""
        begun = time.perf_counter()
        session.num_requests += 1
        session.last_request = begun
        try:
            if data is None:
                raise UserError("a text message; expected a binary one, a msgpack map")
            message = await self._offloaded(len(data), self._unpacked, data)
            if message.pop("reset", False):
                session.plan = None
                if not message:
                    return pack({"reset": True})
            key = self._key(message)
            observation = await self._offloaded(len(data), self._observed, message, key)
            if self.replies_actions:
                actions_KA, answer = await self._next_action(session, key, observation)
            else:
                answer = await self.batcher.infer(key, observation)
                actions_KA = answer.actions_KA[: self.config.steps_per_call]
        except Exception as error:
            return self._complaint(error, session.client)[0]
        timing = self._timed(begun, answer)
        if session.previous_ms is not None:
            timing["prev_total_ms"] = session.previous_ms
        reply = pack({"actions": np.ascontiguousarray(actions_KA), "server_timing": timing})
        session.previous_ms = self._count(begun, answer, session.client, observation, actions_KA)
        return reply

    async def _next_action(
        self, session: Session, key: str, observation: Observation
    ) -> tuple[np.ndarray, Answer | None]:
        """The action to execute now, [1, A], and the answer of the policy if it was asked."""
        if session.plan is None or session.key != key:
            session.key, session.plan = key, self._plan(self.actors[key])
        answer = await self.batcher.infer(key, observation) if session.plan.due else None
        chunk_KA = np.zeros((0, 0), np.float32) if answer is None else answer.actions_KA
        return session.plan.next(lambda: chunk_KA)[None], answer

    # REST.

    async def page(self, request: Request) -> Response:
        if not PAGE.exists():
            return _line("lapa serve: a websocket is here; see /metadata", 200)
        return FileResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"})

    async def act(self, request: Request) -> Response:
        """OpenVLA's: the first action of the chunk, as json_numpy's array; as text of it where the request was."""
        return await self._answer(request, lambda actions_KA, timing: to_json(actions_KA[0]))

    async def infer(self, request: Request) -> Response:
        """The whole chunk as lists."""
        return await self._answer(
            request, lambda actions_KA, timing: {"actions": actions_KA.tolist(), "server_timing": timing}
        )

    async def status(self, request: Request) -> Response:
        """Counts, latencies of the last minutes, and the last observation with its actions."""
        now, last = time.time(), self._last
        rows = self.figures.since(now - LATENCY_SECONDS)
        # The latest are all shown, so that they can be counted; of those before, as many as a plot has room for.
        before = int(np.searchsorted(rows[:, 0], now - COUNTED_SECONDS))
        rows = np.concatenate([rows[: before : max(1, math.ceil(before / SHOWN_LATENCIES))], rows[before:]])
        return JSONResponse(
            {
                "uptime_s": round(now - self.figures.started, 3),
                "requests": self.figures.requests,
                "busy": self.figures.busy,
                "errors": self.figures.errors,
                "clients": len(self.sessions),
                "queue": self.batcher.waiting,
                "latency": [[round(value, 3) for value in row] for row in rows.tolist()],
                "last": None if last is None else await asyncio.to_thread(_as_shown, *last),
            }
        )

    async def _answer(self, request: Request, form: Callable[[np.ndarray, dict[str, Any]], Any]) -> Response:
        """The response to an observation in JSON, whose content `form` makes of the chunk and the timing."""
        begun = time.perf_counter()
        client = _address(request)
        with self._counted():
            try:
                body = await self._body(request)
                self._recent[client.rpartition(":")[0]] = begun
                message, encoded = await self._offloaded(len(body), parse_body, body)
                key = self._key(message)
                observation = await self._offloaded(len(body), self._observed, message, key)
                answer = await self.batcher.infer(key, observation)
            except ClientDisconnect:
                return Response(status_code=400)
            except Exception as error:
                return _line(*self._complaint(error, client))
            content = form(answer.actions_KA, self._timed(begun, answer))
            response = JSONResponse(json.dumps(content) if encoded else content)
            self._count(begun, answer, client, observation, answer.actions_KA)
            return response

    async def _body(self, request: Request) -> bytes:
        """Reads a bounded body. Raises UserError where it is too large, too slow or compressed."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise UserError("compressed bodies are not read; send it as it is")
        most = self.config.max_message_mib * 2**20
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    # What is too large is read to its end and forgotten, so that the client reads the response.
                    if size <= most:
                        parts.append(part)
                    else:
                        parts.clear()
        except TimeoutError:
            raise UserError(f"the body did not arrive within {BODY_SECONDS:g} s") from None
        if size > most:
            raise _TooLarge(f"a body of {size} bytes; at most {self.config.max_message_mib} MiB (--max-message-mib)")
        return b"".join(parts)

    # Both.

    def _unpacked(self, data: bytes) -> dict[Any, Any]:
        try:
            return unpack(data, self.config.max_message_mib * 2**20)
        except ValueError as error:
            raise UserError(error) from None

    def _key(self, message: dict[Any, Any]) -> str:
        """Takes `unnorm_key` from a message, and returns the key of the statistics to act with."""
        key = message.pop("unnorm_key", None)
        known = [name for name in self.actors if name]
        if key is None:
            if self.statistics_key is None:
                raise UserError(f"the policy has statistics of several datasets; give unnorm_key: {', '.join(known)}")
            return self.statistics_key
        if not isinstance(key, str) or key not in known:
            raise unknown("unnorm_key", str(key)[:100], known)
        return key

    def _observed(self, message: Mapping[Any, Any], key: str) -> Observation:
        """A message as an observation that the policy can act on. Raises UserError where it is none."""
        actor, most = self.actors[key], self.config.max_image
        found = self.keys.observation(message)
        for camera in actor.cameras:
            image = found[camera]
            if not isinstance(image, np.ndarray):
                raise UserError(f"camera {camera}: got {type(image).__name__}, expected an array of an RGB image")
            if image.ndim == 3:
                sides = sorted(image.shape)[1:] if 3 in image.shape else image.shape
                if min(sides) < LEAST_IMAGE or max(sides) > most:
                    raise UserError(
                        f"camera {camera}: an image of shape {list(image.shape)}; height and width must be "
                        f"{LEAST_IMAGE} to {most} (--max-image)"
                    )
        instruction = found.get("instruction", "")
        if isinstance(instruction, str) and len(instruction) > self.config.max_instruction:
            raise UserError(
                f"an instruction of {len(instruction)} characters; at most {self.config.max_instruction} "
                "(--max-instruction)"
            )
        try:
            return actor.checked([found])[0]
        except UserError as error:
            raise UserError(str(error).removeprefix("observation 0: ")) from None

    def _timed(self, begun: float, answer: Answer | None) -> dict[str, Any]:
        infer_ms, batch = (0.0, 0) if answer is None else (answer.infer_ms, answer.batch)
        return {"infer_ms": infer_ms, "server_ms": 1000 * (time.perf_counter() - begun), "batch": batch}

    def _count(
        self, begun: float, answer: Answer | None, client: str, observation: Observation, actions_KA: np.ndarray
    ) -> float:
        """Keeps the figures of an answered request. Returns its milliseconds."""
        total_ms = 1000 * (time.perf_counter() - begun)
        infer_ms, batch = (0.0, 0) if answer is None else (answer.infer_ms, answer.batch)
        self.figures.add(total_ms, infer_ms, batch)
        self._last = time.time(), client, observation, actions_KA
        return total_ms

    def _complaint(self, error: Exception, client: str) -> tuple[str, int]:
        """Counts an error, and returns its one line and the status of HTTP."""
        if isinstance(error, Busy):
            self.figures.busy += 1
            return f"busy: {error}; try again", 503
        self.figures.errors += 1
        if shortage := out_of_memory(error):
            line, status = f"error: the server is out of memory ({shortage})", 500
        elif isinstance(error, UserError):
            line, status = f"error: {error}", 413 if isinstance(error, _TooLarge) else 400
        else:
            line, status = f"error: the server failed ({type(error).__name__}); its log has more", 500
            console.print(printable("".join(traceback.format_exception(error))), soft_wrap=True)
        line = printable(line)[:LONGEST_ERROR]
        now = time.monotonic()
        if now - self._last_complaint > 1:
            self._last_complaint = now
            say(f"{client}: {line}")
        return line, status

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Counts a request as one that runs, until its answer is sent."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    async def _offloaded(self, size: int, work: Callable[..., Any], *arguments: Any) -> Any:
        if self._stopping:
            raise Busy("the server is stopping")
        if size > LARGE_MESSAGE:
            return await asyncio.to_thread(work, *arguments)
        return work(*arguments)

    def _num_active(self) -> int:
        """Clients that sent a request within ACTIVE_SECONDS."""
        since = time.perf_counter() - ACTIVE_SECONDS
        self._recent = {host: moment for host, moment in self._recent.items() if moment >= since}
        return len(self._recent) + sum(session.last_request >= since for session in self.sessions)

    def _plan(self, actor: Actor) -> Execution:
        if self.config.ensemble is None:
            return RecedingHorizon(self.config.steps_per_call)
        return TemporalEnsemble(self.config.ensemble, self.config.steps_per_call or 1, actor.action_space.binary)

    def _check_fit(self) -> None:
        """Raises UserError where the options do not fit the policy's chunk."""
        steps, chunk = self.config.steps_per_call, self.actor.chunk
        if steps is not None and steps > chunk:
            raise UserError(f"--steps-per-call {steps} is more than the policy's chunk of {chunk}")
        if self.config.ensemble is not None and (steps or 1) >= chunk:
            raise UserError(
                f"--ensemble: a chunk of {chunk} ends before the next one starts, so there is nothing to average; "
                "give a smaller --steps-per-call, or a policy with a longer chunk"
            )

    def _describe(self) -> dict[str, Any]:
        actor, config = self.actor, self.config
        space = actor.action_space
        return {
            "protocol_version": PROTOCOL,
            "lapa_version": __version__,
            "policy": config.policy.name,
            "kind": actor.config.backbone.kind if isinstance(actor, Policy) else type(actor).__name__.lower(),
            "device": str(getattr(actor, "device", "cpu")),
            "cameras": list(actor.cameras),
            "keys": {**self.keys.images, **{camera: camera for camera in self.keys.unnamed}},
            "state_keys": list(self.keys.state),
            "state_dim": actor.state_dim,
            "chunk": actor.chunk,
            "reply": "action" if self.replies_actions else "chunk",
            "reply_steps": 1 if self.replies_actions else config.steps_per_call or actor.chunk,
            "action_dim": actor.action_dim,
            "action_names": list(space.names),
            "binary": list(space.binary),
            "control": space.control,
            "fps": actor.fps,
            "statistics_key": self.statistics_key,
            "statistics_keys": [name for name in self.actors if name],
            "instruction": True,
            "max_message_bytes": config.max_message_mib * 2**20,
            "max_image": config.max_image,
            "max_instruction": config.max_instruction,
        }

    async def _warm_up(self) -> None:
        """Asks the policy once, so that the first request is as fast as others. Raises what the policy raises."""
        blank = np.zeros((224, 224, 3), np.uint8)
        state = np.zeros(self.actor.state_dim, np.float32) if self.actor.state_dim else None
        observation = Observation(dict.fromkeys(self.actor.cameras, blank), "", state)
        await self.batcher.infer(self.statistics_key or next(iter(self.actors)), observation)

    async def _report(self) -> None:
        """Prints counts and latencies each minute in which there were requests."""
        figures, before = self.figures, 0
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            if figures.requests > before:
                rows = figures.since(time.time() - REPORT_SECONDS)
                p50, p99 = np.percentile(rows[:, 1], (50, 99)) if len(rows) else (0.0, 0.0)
                say(
                    f"{figures.requests} requests, {(figures.requests - before) / REPORT_SECONDS:.1f}/s, "
                    f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, {figures.busy} busy, {figures.errors} errors, "
                    f"{len(self.sessions)} clients"
                )
            before = figures.requests

    def _guarded(self, app: ASGIApp) -> ASGIApp:
        """The app behind the checks of who may ask; a request that fails them gets one line."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if refusal := self._refusal(HTTPConnection(scope)):
                if scope["type"] == "websocket":
                    await WebSocket(scope, receive, send).send_denial_response(refusal)
                else:
                    await refusal(scope, receive, send)
                return
            try:
                await app(scope, receive, send)
            except Exception as error:
                self._complaint(error, _address(HTTPConnection(scope)))

        return guarded

    def _refusal(self, connection: HTTPConnection) -> Response | None:
        """The response to a client that may not ask: a page of another site, or one without the key."""
        host = connection.headers.get("host", "")
        origin = connection.headers.get("origin")
        # A site could give its own name this machine's address; with a key that is of no use to it.
        if self.loopback and self.key is None and not _is_local(host):
            return _line(f"error: the host {host[:100]} is not this machine; ask for localhost", 403)
        if origin is not None and origin.partition("://")[2] != host:
            return _line(f"error: pages of another site ({origin[:100]}) may not ask", 403)
        if self.key is None or (connection.scope["type"] == "http" and connection.scope["path"] in OPEN_PATHS):
            return None
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), self.key)
        if right and scheme.lower() in ("api-key", "bearer"):
            return None
        return _line("error: wrong or no key; send the header Authorization: Api-Key KEY", 401)


class _TooLarge(UserError):
    """A body above --max-message-mib."""


class _Uvicorn(uvicorn.Server):
    """A server without handlers of signals: the command has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _run(service: Service, listener: socket.socket) -> bool:
    """Serves until a signal, and returns whether it was Ctrl-C. A second one is Python's own again."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    received = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def end(number: signal.Signals) -> None:
        received.append(number)
        stop.set()
        say("stopping: requests that run are answered first")
        for each, handler in before.items():
            loop.remove_signal_handler(each)
            signal.signal(each, handler)

    for number in before:
        loop.add_signal_handler(number, end, number)
    await service.serve(listener, stop, lambda: _announce(service, listener))
    return signal.SIGINT in received


def _announce(service: Service, listener: socket.socket) -> None:
    """Prints what is served, where, what a message must have, and how to try it."""
    url, metadata = url_of(listener), service.metadata
    rate = f" at {metadata['fps']:g} fps" if metadata["fps"] else ""
    say(
        f"{service.config.policy}: {metadata['reply_steps']} x {metadata['action_dim']} actions{rate}, "
        f"on {metadata['device']}"
    )
    say(f"expects: {service.keys.wanted()}")
    console.print(Text.assemble("at ", (url, "bold"), " (websocket and REST; a page in the browser)"), soft_wrap=True)
    header = "" if service.key is None else "-H 'Authorization: Api-Key KEY' "
    say(f"try: curl {header}{url}/metadata")
    if not service.loopback and service.key is None:
        console.print(
            Text(
                f"warning: everybody who reaches {listener.getsockname()[0]} can ask the policy and see its last "
                "image: give --api-key-file, or leave out --host",
                "bold yellow",
            ),
            soft_wrap=True,
        )


def _line(text: str, status: int) -> Response:
    return PlainTextResponse(printable(text), status)


def _address(connection: HTTPConnection) -> str:
    client = connection.client
    return "unknown" if client is None else f"{client.host}:{client.port}"


def _is_local(host: str) -> bool:
    """Whether a Host header is an IP address or localhost: names that no other site can own."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _as_shown(moment: float, client: str, observation: Observation, actions_KA: np.ndarray) -> dict[str, Any]:
    """The last observation and its actions for the page; images as small JPEG."""
    images = {}
    for camera, image_HWC in observation.images.items():
        image = Image.fromarray(np.ascontiguousarray(image_HWC))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(file := io.BytesIO(), "JPEG", quality=85)
        images[camera] = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {
        "time": moment,
        "client": client,
        "images": images,
        "instruction": observation.instruction,
        "state": None if observation.state is None else observation.state.tolist(),
        "actions": actions_KA.tolist(),
    }

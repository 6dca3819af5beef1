"""A web server of this machine: its socket, who may ask, the headers of a page, and how it runs and ends.

`lapa serve` and `lapa view` share it; it needs starlette and uvicorn (`pip install 'lapa-vla[serve]'`).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import ipaddress
import re
import signal
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import uvicorn
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response

from lapa.console import say
from lapa.errors import UserError, printable

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

# Connections of any kind at once.
MAX_CONNECTIONS = 256
ADDRESS = "give another --port, or 0 for a free one"


class Uvicorn(uvicorn.Server):
    """uvicorn without output and without handlers of signals: the command has its own."""

    def __init__(self, app: Any, **options: Any) -> None:
        shared: dict[str, Any] = {
            "http": "h11",
            "loop": "asyncio",
            "lifespan": "off",
            "limit_concurrency": MAX_CONNECTIONS,
            "log_config": None,
            "log_level": "critical",
            "access_log": False,
            "proxy_headers": False,
            "server_header": False,
            "timeout_keep_alive": 60,
            "timeout_graceful_shutdown": 5,
        }
        super().__init__(uvicorn.Config(app, **shared, **options))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server(ABC):
    """An ASGI application on a listening socket, which answers requests from `serve` to `stop`."""

    # Of Uvicorn, in addition to those that all servers share.
    options: Mapping[str, Any] = {}

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self._stop: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @abstractmethod
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or one websocket."""

    @property
    def url(self) -> str:
        """The address for clients on this machine."""
        return url_of(self.listener)

    def work(self) -> Iterable[Coroutine[Any, Any, None]]:
        """What runs from before `begin` to the end; where one fails, the server ends with its error."""
        return ()

    async def begin(self) -> None:
        """Is awaited before the first request may come."""
        return

    async def finish(self) -> None:
        """Is awaited after `stop`, while requests that run are answered."""
        return

    async def serve(self, ready: Callable[[], None]) -> None:
        """Answers requests until `stop`, and then those that run. ready: called once the first may come."""
        uvicorn, stop = Uvicorn(self, **self.options), asyncio.Event()
        self._stop = asyncio.get_running_loop(), stop
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(each) for each in self.work()]
        try:
            await self.begin()
            serving = asyncio.create_task(uvicorn.serve([self.listener]))
            tasks += [serving, asyncio.create_task(stop.wait())]
            while not uvicorn.started and not serving.done():
                await asyncio.sleep(0.005)
            ready()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await self.finish()
            uvicorn.should_exit = True
            await serving
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    def stop(self) -> None:
        """Ends `serve` once the requests that run are answered; from any thread."""
        if self._stop is not None:
            loop, stop = self._stop
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(stop.set)


@contextlib.contextmanager
def listening(host: str, port: int, where: str, fix: str = ADDRESS) -> Iterator[socket.socket]:
    """A socket that listens at an address. where: the options that give it; fix: what to do where it is in use.

    Raises UserError where the address is in use or not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{where}: no such address ({error}); give an address of this machine") from None
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            # Without this, a second server could bind to the port while what it serves is loaded.
            listener.listen(128)
        except OSError as error:
            raise UserError(f"{where}: cannot listen there ({error.strerror}); {fix}") from None
        yield listener


def url_of(listener: socket.socket) -> str:
    """Returns the address of a listening socket for clients on this machine, such as http://127.0.0.1:8000."""
    name, port = listener.getsockname()[:2]
    host = ipaddress.ip_address(name)
    if host.is_unspecified:
        host = ipaddress.ip_address("127.0.0.1" if host.version == 4 else "::1")
    return f"http://{host if host.version == 4 else f'[{host}]'}:{port}"


def require_port(port: int) -> None:
    """Raises UserError for a `--port` that is no port."""
    if not 0 <= port <= 65535:
        bound = "at least 0" if port < 0 else "at most 65535"
        raise UserError(f"--port must be {bound}, got {port}")


def refusal(connection: HTTPConnection, *, local: bool) -> Response | None:
    """Returns the response to a page of another site, which may not ask; None for all others.

    local: whether only this machine may ask. Then the host must be one that no other site can give this address to.
    """
    host, origin = connection.headers.get("host", ""), connection.headers.get("origin")
    if local and not _is_local(host):
        return line(f"error: the host {host[:100]!r} is not this machine; ask for localhost", 403)
    if origin is not None and origin.partition("://")[2] != host:
        return line(f"error: pages of another site ({origin[:100]}) may not ask", 403)
    return None


def line(text: str, status: int) -> Response:
    """Returns a response of one line."""
    return PlainTextResponse(printable(text), status)


async def read_body(request: Request, most: int) -> tuple[bytes, int]:
    """Returns the body of a request and its size.

    A larger one than `most` bytes is read to its end and forgotten, so that the client reads the response.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        parts.append(part)
        if size > most:
            parts.clear()
    return b"".join(parts), size


def page_headers(html: str, **sources: str) -> dict[str, str]:
    """Returns the headers of a page: only its own script and style run, and it asks only this server.

    sources: further sources of its Content-Security-Policy, such as `media="'self'"`.
    """
    allowed = {"img": "data: blob:", "connect": "'self'", **sources}
    policy = (
        f"default-src 'none'; script-src {_source(html, 'script')}; style-src {_source(html, 'style')}; "
        + "".join(f"{kind}-src {source}; " for kind, source in allowed.items())
        + "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


async def until_a_signal(server: Server, ready: Callable[[], None]) -> bool:
    """Serves until SIGTERM or Ctrl-C, and returns whether it was Ctrl-C. A second one ends the process as usual."""
    loop = asyncio.get_running_loop()
    received = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def end(number: signal.Signals) -> None:
        received.append(number)
        say("stopping: requests that run are answered first")
        server.stop()
        for each, handler in before.items():
            loop.remove_signal_handler(each)
            signal.signal(each, handler)

    for number in before:
        loop.add_signal_handler(number, end, number)
    await server.serve(ready)
    return signal.SIGINT in received


@contextlib.contextmanager
def in_thread(server: Server) -> Iterator[str]:
    """Serves in a thread while the block runs, and yields the URL. Raises what `serve` raised."""
    ready, failed = threading.Event(), []

    def serve() -> None:
        try:
            asyncio.run(server.serve(ready.set))
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=serve, name="server")
    thread.start()
    try:
        ready.wait()
        if not failed:
            yield server.url
    finally:
        server.stop()
        thread.join()
    if failed:
        raise failed[0]


def _source(html: str, tag: str) -> str:
    """Returns the hash of the only element of this kind, or this server, as a source of the Content-Security-Policy."""
    inside = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    if not inside:
        return "'self'"
    (content,) = inside
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _is_local(host: str) -> bool:
    """Whether a Host header is an IP address or localhost: names that no other site can own."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False

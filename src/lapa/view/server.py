"""Datasets, latent actions, models, policies, results and studies in the browser: one page, to this machine alone.

    lapa view DATASET
    lapa view DATASET/labels/LAM_FINGERPRINT
    lapa view LABELS --data DATASET --port 7861
    lapa view rlds:bridge_dataset/1.0.0
    lapa view LAM --data DATASET --compare OTHER_LAM
    lapa view POLICY --data ROBOT_DATASET --lam LAM
    lapa view DATASET --export FOLDER --limit 20
    lapa view DATASET --rerun FILE.rrd
    lapa view RESULTS --compare OTHER_RESULTS
    lapa view STUDY

/data/NAME.json    what the page shows (lapa.view.pages)
/files/NAME        its videos, in parts as the browser asks for them
/ask/NAME          what the page asks with data of its own (POST)
/page/FILE         scripts and style

Names and numbers are all that can be asked for: nothing is read but what the command names and, for the examples of a
model or policy, a dataset folder on this machine that its config names.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from lapa.console import console, say
from lapa.errors import UserError
from lapa.view.config import ViewConfig
from lapa.view.export import export
from lapa.view.opening import open_pages
from lapa.view.pages import PAGE, Pages, UnknownNameError
from lapa.view.recording import record

try:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect, HTTPConnection, Request
    from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    from lapa import web
except ModuleNotFoundError as error:
    if (error.name or "").startswith("lapa"):
        raise
    raise UserError(f"lapa view needs {error.name}; install it: pip install 'lapa-vla[serve]'") from None

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

HOST = "127.0.0.1"
# Of a question of the page, which may hold images.
MOST_BYTES = 64 * 2**20


def run(config: ViewConfig) -> None:
    """`lapa view`: answers the browser until SIGTERM or Ctrl-C, or writes the export.

    Raises UserError for what cannot be shown and a port in use, and KeyboardInterrupt after Ctrl-C.
    """
    web.require_port(config.port)
    if config.export is not None and config.rerun is not None:
        raise UserError("--export and --rerun: give one of them")
    if config.export is not None or config.rerun is not None:
        (export if config.rerun is None else record)(config)
        return
    where = f"--port {config.port}"
    with (
        web.listening(HOST, config.port, where) as listener,
        contextlib.closing(open_pages(config)) as pages,
    ):
        server = Server(pages, listener)
        interrupted = asyncio.run(web.until_a_signal(server, lambda: _announce(server, config)))
    if interrupted:
        raise KeyboardInterrupt


@contextlib.contextmanager
def running(path: str | Path, **options: Any) -> Iterator[str]:
    """Serves the page at a free port in a thread while the block runs, and yields its URL; raises as `run`.

    options: fields of ViewConfig.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(web.listening(HOST, 0, "--port 0"))
        pages = stack.enter_context(contextlib.closing(open_pages(ViewConfig(str(path), **options))))
        yield stack.enter_context(web.in_thread(Server(pages, listener)))


class Server(web.Server):
    """The page and its data on a listening socket of this machine."""

    def __init__(self, pages: Pages, listener: socket.socket) -> None:
        super().__init__(listener)
        self.pages = pages
        self._app = Starlette(
            routes=[
                Route("/", self.page),
                Route("/data/{name}.json", self.data),
                Route("/files/{name}", self.file),
                Route("/ask/{name}", self.ask, methods=["POST"]),
                Mount("/page", StaticFiles(directory=PAGE)),
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application: a request goes on to its route, unless it is of a page of another site."""
        if scope["type"] == "http" and (refusal := web.refusal(HTTPConnection(scope), local=True)):
            return await refusal(scope, receive, send)
        return await self._app(scope, receive, send)

    async def page(self, request: Request) -> Response:
        html = self.pages.html
        return HTMLResponse(html, headers=web.page_headers(html, media="'self'", img="'self' data: blob:"))

    async def data(self, request: Request) -> Response:
        return await self._answered(lambda: JSONResponse(self.pages.json(request.path_params["name"])))

    async def file(self, request: Request) -> Response:
        return await self._answered(lambda: FileResponse(self.pages.file(request.path_params["name"])))

    async def ask(self, request: Request) -> Response:
        try:
            body, size = await web.read_body(request, MOST_BYTES)
        except ClientDisconnect:
            return Response(status_code=400)
        if size > MOST_BYTES:
            return web.line(f"error: {size} bytes; give images of at most {MOST_BYTES} together", 413)
        name = request.path_params["name"]
        return await self._answered(lambda: JSONResponse(self.pages.answer(name, body)))

    async def _answered(self, make: Callable[[], Response]) -> Response:
        """The response that `make` returns; one line where there is no such thing, or it cannot be read."""
        try:
            return await run_in_threadpool(make)
        except UnknownNameError:
            return web.line("error: there is no such thing", 404)
        except UserError as error:
            return web.line(f"error: {error}", 422)
        except Exception as error:
            console.print("".join(traceback.format_exception(error)), soft_wrap=True, markup=False, highlight=False)
            return web.line(
                f"error: {type(error).__name__} in lapa view; see the traceback in the terminal that runs it", 500
            )


def _announce(server: Server, config: ViewConfig) -> None:
    say(f"{config.path}: {server.pages.summary}")
    console.print(Text.assemble("open ", (server.url, "bold"), " in a browser; Ctrl-C ends"), soft_wrap=True)
    if server.pages.exportable:
        options = [
            *([] if config.data is None else ["--data", config.data]),
            *(["--compare", *config.compare] if config.compare else []),
            *([] if config.lam is None else ["--lam", config.lam]),
        ]
        say(f"to send it to others: {shlex.join(['lapa', 'view', config.path, *options, '--export', 'FOLDER'])}")

"""Datasets and latent actions in the browser: one page, from this machine to this machine.

    lapa view DATASET
    lapa view DATASET/labels/LAM_FINGERPRINT
    lapa view LABELS --data DATASET --port 7861
    lapa view rlds:bridge_dataset/1.0.0
    lapa view DATASET --export FOLDER --limit 20

/data/NAME.json    what the page shows (lapa.view.pages)
/files/NAME        its videos, in parts as the browser asks for them
/page/FILE         scripts and style

Names and numbers are all that can be asked for, so that nothing outside PATH is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from lapa.config import require_at_least
from lapa.console import console, say
from lapa.data.dataset import Dataset
from lapa.data.labels import Labels
from lapa.data.metadata import INFO
from lapa.data.spec import open_dataset
from lapa.errors import UserError
from lapa.hub.artifacts import KINDS, MARKERS, kind_of
from lapa.view.config import ViewConfig
from lapa.view.dataset import DatasetPages
from lapa.view.export import PAGE, export
from lapa.view.pages import Pages

try:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import HTTPConnection, Request
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
SHOWN = ("dataset", "labels")


def run(config: ViewConfig) -> None:
    """`lapa view`: answers the browser until SIGTERM or Ctrl-C, or writes the export.

    Raises UserError for what cannot be shown and a port in use, and KeyboardInterrupt after Ctrl-C.
    """
    require_at_least(config, limit=1)
    web.require_port(config.port)
    if config.export is not None:
        export(config, *opened(config.path, config.data))
        return
    where = f"--port {config.port}"
    with (
        web.listening(HOST, config.port, where) as listener,
        contextlib.closing(DatasetPages(*opened(config.path, config.data))) as pages,
    ):
        server = Server(pages, listener)
        interrupted = asyncio.run(web.until_a_signal(server, lambda: _announce(server, config)))
    if interrupted:
        raise KeyboardInterrupt


@contextlib.contextmanager
def running(path: str | Path, data: str | None = None) -> Iterator[str]:
    """Serves the page at a free port in a thread while the block runs, and yields its URL; raises as `run`."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(web.listening(HOST, 0, "--port 0"))
        pages = stack.enter_context(contextlib.closing(DatasetPages(*opened(str(path), data))))
        yield stack.enter_context(web.in_thread(Server(pages, listener)))


def opened(path: str, data: str | None = None) -> tuple[Dataset, Labels | None]:
    """Returns the dataset at a path, or the labels there and their dataset.

    data: the dataset of labels; None: the one in whose folder they are.
    Raises UserError where there is neither, and where the labels are of another dataset.
    """
    folder = Path(path)
    holds_one = folder.is_dir() and any((folder / name).exists() for name in MARKERS)
    kind = kind_of(folder) if holds_one else "dataset"
    if kind not in SHOWN:
        raise UserError(f"{path}: {KINDS[kind].name} cannot be shown; lapa view shows datasets and labels")
    if kind == "dataset":
        if data is not None:
            raise UserError(f"--data is the dataset of labels, and {path} is none of these; leave out --data")
        return open_dataset(path), None
    if data is None:
        data = str(folder.absolute().parent.parent)
        if not (Path(data) / INFO).exists():
            raise UserError(f"{path}: is not inside its dataset; give it: --data DATASET")
    dataset = open_dataset(data)
    return dataset, Labels.open(folder, dataset_fingerprint=dataset.fingerprint)


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
                Mount("/page", StaticFiles(directory=PAGE)),
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application: a request goes on to its route, unless it is of a page of another site."""
        if scope["type"] == "http" and (refusal := web.refusal(HTTPConnection(scope), local=True)):
            return await refusal(scope, receive, send)
        return await self._app(scope, receive, send)

    async def page(self, request: Request) -> Response:
        html, headers = web.load_page(PAGE / self.pages.html, media="'self'")
        return HTMLResponse(html, headers=headers)

    async def data(self, request: Request) -> Response:
        return await self._answered(lambda: JSONResponse(self.pages.json(request.path_params["name"])))

    async def file(self, request: Request) -> Response:
        return await self._answered(lambda: FileResponse(self.pages.file(request.path_params["name"])))

    async def _answered(self, make: Callable[[], Response]) -> Response:
        """The response that `make` returns; one line where there is no such thing, or it cannot be read."""
        try:
            return await run_in_threadpool(make)
        except KeyError:
            return web.line("error: there is no such thing", 404)
        except UserError as error:
            return web.line(f"error: {error}", 422)


def _announce(server: Server, config: ViewConfig) -> None:
    say(f"{config.path}: {server.pages.summary}")
    console.print(Text.assemble("open ", (server.url, "bold"), " in a browser; Ctrl-C ends"), soft_wrap=True)
    say(f"to send it to others: lapa view {shlex.quote(config.path)} --export FOLDER")

"""An S3 server on the loopback address (moto's), whose answers a test can spoil: `Faults`."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

Fault = Literal["500", "503", "403", "slow", "cut before", "cut after", "half"]
ERROR = (
    '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message><Resource>/</Resource>'
    "<RequestId>1</RequestId></Error>"
)
CODES = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}


@dataclass
class Faults:
    """A WSGI server in front of another.

    faults: [expression of requests such as `PUT /bucket/name`, what happens to them, how often]. slow: seconds of a
    slow answer. cut before, cut after: the connection ends before, or after, the request has been carried out; half:
    amid its answer. seen: all requests; sent: bytes of the answers to each kind of them. hooks: called with each
    request before it is carried out.
    """

    app: Any
    faults: list[tuple[str, Fault, int]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    hooks: list[Callable[[str], None]] = field(default_factory=list)
    slow: float = 0.2
    lock: Any = field(default_factory=threading.Lock)
    carried_out: Any = field(default_factory=threading.Lock)

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        self.seen.append(request)
        for hook in self.hooks:
            hook(request)
        fault = self._fault(request)
        # What is not read would be taken for the next request.
        if fault in (*CODES, "cut before"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if fault == "slow":
            time.sleep(self.slow)
        if fault == "cut before":
            return self._cut(environ)
        if fault in CODES:
            text = ERROR.format(code=CODES[fault], message=f"{CODES[fault]} for a test").encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))]
            start(f"{fault} Fault", headers)
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [text]
        # A condition holds until its object is made, which moto does not see to by itself.
        with self.carried_out:
            answer = b"".join(self.app(environ, start))
            self.sent[request] += len(answer)
        if fault == "cut after":
            return self._cut(environ)
        if fault == "half":
            return self._half(environ, answer)
        return [answer]

    def _fault(self, request: str) -> Fault | None:
        with self.lock:
            for number, (pattern, fault, times) in enumerate(self.faults):
                if times and re.search(pattern, request):
                    self.faults[number] = (pattern, fault, times - 1)
                    return fault
        return None

    def _half(self, environ: dict[str, Any], answer: bytes) -> Iterator[bytes]:
        yield answer[: len(answer) // 2]
        self._cut(environ)

    def _cut(self, environ: dict[str, Any]) -> list[bytes]:
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return []


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """The server, with the environment that makes it that of `s3://`; its client repeats no answered request."""
    s3fs = pytest.importorskip("s3fs")
    app = pytest.importorskip("moto.moto_server.werkzeug_app")
    from werkzeug.serving import make_server

    # A line for each request.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    faults = Faults(app.DomainDispatcherApplication(app.create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 120)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield faults
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        server.server_close()

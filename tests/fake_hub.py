"""A Hugging Face hub on loopback: what huggingface_hub asks of the real one, in one process and in memory.

    with FakeHub() as hub, hub.used(monkeypatch, tmp_path):
        hub.repos["model", "ann/lam"].files()

Repositories have branches and tags of commits; a commit is a dictionary of a file's name to its content. `hub.cut = n`
closes connections after n bytes of a body, as often as `hub.cuts` says.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_right"
ENDING = (".safetensors", ".parquet", ".mp4", ".png")
KINDS = {"models": "model", "datasets": "dataset"}
REPO = r"(?P<repo>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets)/{REPO}"


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    tags: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str | None:
        known = {**self.tags, **self.branches, **{name: name for name in self.commits}}
        return known.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        commit = self.commit_of(revision)
        assert commit is not None, f"no revision {revision}"
        return self.commits[commit]


def oid(content: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub:
    """repos: by kind and id; blobs: large files by SHA-256; requests: (method, path) of all, in order."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.created: list[dict[str, Any]] = []
        self.sent: Counter[str] = Counter()
        self.cut: int | None = None
        self.cuts = 0
        self.ranges: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeHub":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def used(self, monkeypatch: pytest.MonkeyPatch, cache: Path, token: str | None = TOKEN) -> None:
        """Lets huggingface_hub in this process speak to this hub, with a cache of its own."""
        from huggingface_hub import constants

        for name, value in self.settings(cache).items():
            if hasattr(constants, name):
                monkeypatch.setattr(constants, name, value if name != "HF_HUB_DISABLE_XET" else True)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        # It waits before it tries again; this is the sleep of the whole process.
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", token or "")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def settings(self, cache: Path) -> dict[str, str]:
        """The environment of another process that speaks to this hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_XET_CACHE": str(cache / "xet"),
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": TOKEN,
        }


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.body = b"" if self.command == "PUT" else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command != "PUT":
            self.hub.tokens.add(token)
        if token not in (None, TOKEN):
            return self._error(401, message="Invalid credentials in Authorization header")
        for pattern, answer in ROUTES:
            method, _, form = pattern.partition(" ")
            if method in (self.command, "ANY") and (match := re.fullmatch(form, path)):
                return answer(self, token is not None, **match.groupdict())
        return self._error(404, message=f"no such address: {self.command} {path}")

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            hub = self.hub
            if hub.cut is not None and hub.cuts > 0 and len(content) > hub.cut and "/resolve/" in self.path:
                hub.cuts -= 1
                self.wfile.write(content[: hub.cut])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.wfile.write(content)

    def _error(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._json({"error": message}, status, **headers)

    def _repo(self, kind: str, repo: str, allowed: bool) -> Repo | None:
        found = self.hub.repos.get((kind, repo))
        if found is None or (found.private and not allowed):
            # As the hub does: without a token, what does not exist and what is private look alike.
            self._error(404 if allowed else 401, "RepoNotFound", "Repository not found")
            return None
        if found.gated:
            self._error(403, "GatedRepo", "Access to this model is restricted")
            return None
        return found

    def create(self, allowed: bool) -> None:
        wanted = json.loads(self.body)
        self.hub.created.append(wanted)
        if not allowed:
            return self._error(401, message="Invalid username or password.")
        if wanted["organization"] == "someone-else":
            return self._error(403, message="You don't have the rights to create a model under this namespace")
        key = wanted.get("type") or "model", f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.hub.url}/{'datasets/' if key[0] == 'dataset' else ''}{key[1]}"
        if key in self.hub.repos:
            return self._json({"error": "You already created this repo", "url": url}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repos[key] = Repo(private=private)
        return self._json({"url": url})

    def validate(self, allowed: bool) -> None:
        text = json.loads(self.body)["content"]
        wrong = re.search(r"^license: bad$", text, re.MULTILINE)
        errors = [{"message": '"license" must be one of the list'}] if wrong else []
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def branch(self, allowed: bool, kind: str, repo: str, name: str) -> None:
        if (found := self._repo(KINDS[kind], repo, allowed)) is None:
            return None
        if name in found.branches:
            return self._error(409, message="Reference already exists")
        found.branches[name] = found.branches["main"]
        return self._json({})

    def tag(self, allowed: bool, kind: str, repo: str, name: str) -> None:
        if (found := self._repo(KINDS[kind], repo, allowed)) is None:
            return None
        if self.command == "DELETE":
            if found.tags.pop(name, None) is None:
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {name}")
            return self._json({})
        commit = found.commit_of(name)
        assert commit is not None
        found.tags[json.loads(self.body)["tag"]] = commit
        return self._json({})

    def preupload(self, allowed: bool, kind: str, repo: str, revision: str) -> None:
        if (found := self._repo(KINDS[kind], repo, allowed)) is None:
            return None
        if found.commit_of(revision) is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        there = found.files(revision)
        files = []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            large = name.endswith(ENDING) or file["size"] > 1_000_000
            content = there.get(name)
            known = None if content is None else hashlib.sha256(content).hexdigest() if large else oid(content)
            mode = "lfs" if large else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return self._json({"files": files})

    def batch(self, allowed: bool, repo: str, prefix: str | None) -> None:
        objects = []
        for each in json.loads(self.body)["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            objects.append({**each, **({} if each["oid"] in self.hub.blobs else {"actions": action})})
        self._json({"transfer": "basic", "objects": objects})

    def put(self, allowed: bool, digest: str) -> None:
        hub, length = self.hub, int(self.headers["Content-Length"])
        if hub.cut is not None and hub.cuts > 0 and length > hub.cut:
            hub.cuts -= 1
            self.rfile.read(hub.cut)
            self.close_connection = True
            self.connection.shutdown(2)
            return None
        content = self.rfile.read(length)
        assert hashlib.sha256(content).hexdigest() == digest
        hub.blobs[digest] = content
        hub.sent[digest] += 1
        return self._json({})

    def commit(self, allowed: bool, kind: str, repo: str, revision: str) -> None:
        if (found := self._repo(KINDS[kind], repo, allowed)) is None:
            return
        files = dict(found.files(revision))
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                self.hub.sent[value["path"]] += 1
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        name = hashlib.sha1(repr(sorted(files.items())).encode() + bytes([len(found.commits)])).hexdigest()
        found.commits[name] = files
        found.branches[revision] = name
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{name}", "commitOid": name, "success": True})

    def info(self, allowed: bool, kind: str, repo: str, revision: str | None = None) -> None:
        if (found := self._repo(KINDS[kind], repo, allowed)) is None:
            return None
        commit = found.commit_of(revision or "main")
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        names = [{"rfilename": name} for name in found.commits[commit]]
        return self._json({"id": repo, "sha": commit, "private": found.private, "siblings": names, "tags": []})

    def tree(self, allowed: bool, kind: str, repo: str, revision: str, folder: str | None) -> None:
        if (found := self._repo(KINDS[kind], repo, allowed)) is None:
            return
        entries = []
        for name, content in found.files(revision).items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": oid(content)}
            if name.endswith(ENDING):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 1}
            entries.append(entry)
        wanted = int(parse_qs(urlsplit(self.path).query).get("limit", ["100000"])[0])
        self._json(entries[:wanted])

    def resolve(self, allowed: bool, repo: str, revision: str, name: str, prefix: str | None) -> None:
        kind = "dataset" if prefix else "model"
        if (found := self._repo(kind, repo, allowed)) is None:
            return None
        commit = found.commit_of(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = found.commits[commit].get(name)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        etag = hashlib.sha256(content).hexdigest() if name.endswith(ENDING) else oid(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if self.command == "GET" and (wanted := self.headers.get("Range")):
            first = int(wanted.removeprefix("bytes=").partition("-")[0])
            self.hub.ranges.append(wanted)
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            return self._send(content[first:], 206, headers)
        return self._send(content, 200, headers)


ROUTES = (
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate),
    (rf"POST {API}/branch/(?P<name>.+)", _Handler.branch),
    (rf"ANY {API}/tag/(?P<name>.+)", _Handler.tag),
    (rf"POST {API}/preupload/(?P<revision>.+)", _Handler.preupload),
    (rf"POST {API}/commit/(?P<revision>.+)", _Handler.commit),
    (rf"POST /(?P<prefix>datasets/)?{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(?P<digest>\w+)", _Handler.put),
    (rf"GET {API}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", _Handler.tree),
    (rf"GET {API}/revision/(?P<revision>.+)", _Handler.info),
    (rf"GET {API}", _Handler.info),
    (rf"ANY /(?P<prefix>datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
)


@contextmanager
def unreachable(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    """A hub at an address where nothing answers."""
    with FakeHub() as hub:
        hub.used(monkeypatch, cache)
    yield

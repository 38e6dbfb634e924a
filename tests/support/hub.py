"""A Hugging Face hub on this machine, as far as downloads need one: information, file lists, files, and refusals.

Processes under test find it through ``HF_ENDPOINT`` and talk to it with the real client.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Refusal:
    """What the hub says instead."""

    status: int
    code: str = ""
    """The hub's ``X-Error-Code``, which tells a gated repository from one that does not exist."""
    message: str = ""
    body: bytes = b"{}"
    files_only: bool = False
    """A gated repository shows its list of files to everybody."""
    silent_s: float = 0.0
    """How long nothing is said at all."""


@dataclass
class MockHub:
    """Repositories and refusals; every request is in ``requests``."""

    url: str
    requests: list[str] = field(default_factory=list)
    revisions: dict[str, dict[str, Path]] = field(default_factory=dict)
    """``models/owner/name`` → revision → folder with its files."""
    refusals: dict[str, Refusal] = field(default_factory=dict)

    def add(self, name: str, folder: Path, revision: str = "main") -> None:
        """Publishes a folder; ``name`` is ``models/owner/name`` or ``datasets/owner/name``."""
        self.revisions.setdefault(name, {})[revision] = folder
        self.revisions[name][commit_of(name, revision)] = folder

    def refuse(self, name: str, refusal: Refusal) -> None:
        """Has the hub refuse a repository."""
        self.refusals[name] = refusal


def commit_of(name: str, revision: str) -> str:
    """The commit of a revision, 40 hexadecimal digits."""
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def _handler(hub: MockHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            api = parts[0] == "api"
            if api:
                parts = parts[1:]
            elif parts[0] != "datasets":
                parts = ["models", *parts]
            name, rest = "/".join(parts[:3]), parts[3:]
            refusal = hub.refusals.get(name)
            if refusal is not None and not (api and refusal.files_only):
                time.sleep(refusal.silent_s)
                return self._answer(
                    refusal.status,
                    refusal.body,
                    {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message},
                )
            revisions = hub.revisions.get(name)
            if revisions is None:
                return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            revision = rest[1] if len(rest) > 1 else "main"
            if revision not in revisions:
                return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            commit = revision if len(revision) == 40 else commit_of(name, revision)
            if api:
                return self._describe(name, commit, revisions[revision], rest[:1] == ["tree"])
            return self._file(commit, revisions[revision] / "/".join(rest[2:]))

        do_HEAD = do_GET

        def _describe(self, name: str, commit: str, folder: Path, tree: bool) -> None:
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            names = [str(path.relative_to(folder)) for path in files]
            listing = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
                for name, path in zip(names, files, strict=True)
            ]
            identity = name.partition("/")[2]
            about = {"id": identity, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
            self._answer(200, json.dumps(listing if tree else about).encode(), {})

        def _file(self, commit: str, path: Path) -> None:
            if not path.is_file():
                return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            content = path.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            try:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    if value:
                        self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):  # the client has given up, which is what is tested
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            return

    return Handler


@contextmanager
def mock_hub() -> Iterator[MockHub]:
    """A hub while the context lasts."""
    hub = MockHub("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

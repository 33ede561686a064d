"""A local Hugging Face Hub for the real client: serves models and datasets from folders and records requests."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(/(?P<what>revision|tree|paths-info)/.*)?")
_FILE = re.compile(r"/(?P<dataset>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)")


class HubServer:
    """Serves `models/OWNER/NAME` and `datasets/OWNER/NAME` of a folder while the context is open."""

    def __init__(self, folder: Path, delay_s: float = 0.0) -> None:
        """Listen.

        Args:
            folder: its root.
            delay_s: delay in seconds before each file is sent.
        """
        self.requests: list[tuple[str, str]] = []
        """Method and path of each request, in order of arrival."""
        handler = type("Handler", (_Handler,), dict(folder=folder, delay_s=delay_s, requests=self.requests))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """The files whose bytes were sent, sorted; a file sent twice is listed twice."""
        return sorted(
            match["file"] for method, path in self.requests if method == "GET" and (match := _FILE.match(path))
        )


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    delay_s: float
    requests: list[tuple[str, str]]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if match := _API.fullmatch(path):
            self._describe(self.folder / match["kind"] / match["name"], match["name"], match["what"], body)
        elif match := _FILE.fullmatch(path):
            self._send_file(self.folder / ("datasets" if match["dataset"] else "models") / match["name"], match["file"])
        else:
            self._send(404, b"")

    def _describe(self, repository: Path, name: str, what: str | None, body: bytes) -> None:
        if not repository.is_dir():
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        entries = [self._entry(repository, file) for file in sorted(repository.rglob("*"))]
        if what == "tree":
            answer: object = entries
        elif what == "paths-info":
            text = body.decode()
            asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
            answer = [entry for entry in entries if entry["path"] in asked]
        else:
            files = [{"rfilename": entry["path"]} for entry in entries if entry["type"] == "file"]
            answer = {"id": name, "sha": COMMIT, "siblings": files, "private": False, "gated": False, "tags": []}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _entry(self, repository: Path, file: Path) -> dict[str, object]:
        name = str(file.relative_to(repository))
        if file.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        return {"type": "file", "path": name, "size": file.stat().st_size, "oid": _digest(file)}

    def _send_file(self, repository: Path, name: str) -> None:
        file = repository / name
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        if self.command == "GET":
            time.sleep(self.delay_s)
        self._send(200, file.read_bytes(), {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()

"""A hub on this machine: what `huggingface_hub` asks for when it makes a repository, uploads to it and downloads."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from huggingface_hub import constants

TOKEN = "hf_of_a_test"


class SmallHub(ThreadingHTTPServer):
    """Repositories by id, each a list of commits, newest last: commit id and files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.created: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories.get(repository, [])
        return next((one for one in reversed(commits) if revision in ("main", one[0])), None)


class _Handler(BaseHTTPRequestHandler):
    server: SmallHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values['organization']}/{values['name']}"
            self.server.created.append(values)
            self.server.repositories.setdefault(name, [])
            self._answer({"url": f"{self.server.url}/{name}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]}
            )
        elif "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            commits = self.server.repositories[name]
            files = dict(commits[-1][1]) if commits else {}
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            commits.append((commit, files))
            self._answer({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})
        else:
            self._answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            if (found := self.server.files(name, revision)) is None:
                self._missing(name)
            elif parts[4:5] == ["tree"]:
                self._answer(
                    [
                        {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for path, content in found[1].items()
                    ]
                )
            else:
                siblings = [{"rfilename": path} for path in found[1]]
                self._answer({"id": name, "sha": found[0], "siblings": siblings, "tags": [], "private": False})
        elif len(parts) > 4 and parts[2] == "resolve":
            found = self.server.files("/".join(parts[:2]), parts[3])
            path = "/".join(parts[4:])
            if found is None or path not in found[1]:
                self._missing("/".join(parts[:2]))
            else:
                content = found[1][path]
                etag = hashlib.sha1(content).hexdigest()
                self._send(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": found[0]})
        else:
            self._answer({}, 404)

    do_HEAD = do_GET

    def _missing(self, name: str) -> None:
        code = "RevisionNotFound" if name in self.server.repositories else "RepoNotFound"
        self._send(b"{}", 404, {"X-Error-Code": code, "X-Error-Message": "not found"})

    def _answer(self, values: Any, status: int = 200) -> None:
        self._send(json.dumps(values).encode(), status, {"Content-Type": "application/json"})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def small_hub(monkeypatch: Any, cache: Any) -> Iterator[SmallHub]:
    """A running hub that `huggingface_hub` takes for the real one, with an empty cache."""
    hub = SmallHub()
    Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()

"""`submit.py prefetch` against a small hub on this machine, and what a job without that hub then finds."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from .conftest import REPOSITORY

SUBMIT = REPOSITORY / "launchers" / "submit.py"


@pytest.fixture
def hub(tiny_llama: Path) -> Iterator[str]:
    """Address of a hub with one model, owner/tiny."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = tiny_llama / self.path.removeprefix("/owner/tiny/resolve/main/")
            found = self.path.startswith("/owner/tiny/resolve/main/") and path.is_file()
            body = path.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """No lines on the console."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_what_was_fetched_serves_nodes_without_a_hub(hub: str, tmp_path: Path) -> None:
    settings = {
        "model": {"name_or_path": "owner/tiny"},
        "train": {"max_steps": 4, "warmup_steps": 1},
        "logging": {"run_dir": "runs/x"},
    }
    (tmp_path / "c.json").write_text(json.dumps(settings))
    flags = ("--config", "c.json", "--offline", "--env", f"HF_HOME={tmp_path / 'home'}", "--gpus-per-node", "0")

    def call(command: str, *more: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ADEPT_DS_"))}
        return subprocess.run(
            [sys.executable, SUBMIT, command, *flags, *more],
            cwd=tmp_path,
            env={**inherited, "HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1", "PWD": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=200,
        )

    before = call("train", "--dry-run")
    assert before.returncode == 1
    assert "owner/tiny', of which config.json is not in this machine's cache" in before.stderr
    first = call("prefetch")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == [
        "owner/tiny: model, 0.00 GB of weights, fetched",
        "owner/tiny: tokenizer, here",
        "bundled problems: data, a local file",
    ]
    assert "in the cache already" in call("prefetch").stdout
    assert call("train", "--dry-run").returncode == 0

    load = "from adept_ds.backbone.load import *; from adept_ds.config.run import ModelConfig; "
    load += "from adept_ds.storage.adapter_folder import backbone_facts; "
    load += "backbone = load_backbone(c := ModelConfig(name_or_path='owner/tiny')); load_tokenizer(c); "
    load += "assert backbone_facts(backbone)['revision'] == 'a' * 40"
    offline = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", load], env=offline, cwd=REPOSITORY, check=True, timeout=200)

"""Run the corpus in one tier and print what came of it as JSON: verdicts, and what the host looks like afterwards.

A program of its own, so that it can run as another user and with another interpreter than the test suite.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import sandbox_corpus as corpus  # noqa: E402

from adept_ds.sandbox import Limits, Program, Sandbox, Tests  # noqa: E402

LEFT = [Path(folder, "adept_ds_left") for folder in ("/dev/shm", "/tmp", "/var/tmp")]


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0) != 0:  # PR_SET_CHILD_SUBREAPER
        raise OSError(ctypes.get_errno(), "prctl")


def descendants() -> set[int]:
    """Return the processes below this one that have not ended."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z":
            parents[int(entry.name)] = int(parent)
    found, generation = set(), {os.getpid()}
    while generation:
        generation = {process for process, parent in parents.items() if parent in generation}
        found |= generation
    return found


def main(tier: str) -> None:
    """Run everything and print one JSON object."""
    os.environ["ADEPT_DS_CANARY"] = "secret"
    adopt_orphans()
    tests = Tests(asserts=corpus.ASSERTS, reference=corpus.RIGHT)
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder, "canary")
        canary.write_text("untouched")
        state = canary.stat()
        abstract = f"adept_ds_test_{os.getpid()}"
        tcp = socket.create_server(("127.0.0.1", 0))
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(tcp.getsockname())
        unix = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for listener, address in zip(unix, (f"\0{abstract}", f"{folder}/socket"), strict=True):
            listener.bind(address)
            listener.listen()
        here = {"@CANARY@": str(canary), "@FOLDER@": folder, "@TCP@": str(tcp.getsockname()[1]), "@ABSTRACT@": abstract}
        here |= {
            "@SOCKET@": f"{folder}/socket",
            "@PID@": str(os.getpid()),
            "@X86@": str(platform.machine() == "x86_64"),
        }
        verdicts = {}
        for programs, limits, workers in (
            (corpus.PROMPT, Limits(memory_mb=512), 2),
            (corpus.TIMEOUTS, Limits(wall_seconds=1.0, cpu_seconds=1.0), 1),
        ):
            submitted = []
            for entry in programs:
                source = entry.source
                for key, value in here.items():
                    source = source.replace(key, value)
                submitted.append(Program(entry.name, source, tests))
            with Sandbox(tier, limits, workers) as sandbox:
                for verdict in sandbox.run(submitted):
                    kind = f":{verdict.kind}" if verdict.kind else ""
                    verdicts[verdict.id] = [verdict.status + kind, verdict.detail]
        reached = []
        for name, listener in (("tcp", tcp), ("udp", udp), ("abstract", unix[0]), ("file", unix[1])):
            listener.setblocking(False)
            try:
                listener.recv(1) if listener is udp else listener.accept()
                reached.append(name)
            except BlockingIOError:
                pass
            listener.close()
        after = canary.stat()
        untouched = canary.read_text() == "untouched" and (after.st_mode, after.st_mtime) == (
            state.st_mode,
            state.st_mtime,
        )
    deadline = time.monotonic() + 5
    while (processes := descendants()) and time.monotonic() < deadline:
        time.sleep(0.1)
    files = [str(path) for path in LEFT if path.exists()]
    print(
        json.dumps(
            {
                "verdicts": verdicts,
                "reached": reached,
                "untouched": untouched,
                "processes": len(processes),
                "files": files,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])

"""A fork server's process as the grader sees it: start, hand over programs, stop."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from adept_ds.errors import UserError

from .program import Limits

_BOOT = "import sys; sys.path[:1] = []; sys.path.append(sys.argv[1]); from inside.server import main; main()"
CODE = str(Path(__file__).resolve().parent)
_START_SECONDS = 60.0
_STOP_SECONDS = 3.0
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
"""All that a program sees of an environment."""


class WorkerRefused(RuntimeError):
    """The isolation could not be set up; the text names the step."""


class Worker:
    """One running fork server.

    `config` names the tier, the packages that programs may import with their folders, and, where the tier has files of
    its own, the paths that are shown inside.
    """

    def __init__(self, command: list[str], config: dict[str, Any]) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        number = theirs.fileno()
        # fork and exec, never a fork alone: a caller that holds a large model would pay for it with each program.
        self.process = subprocess.Popen(
            [*command, "-s", "-S", "-B", "-c", _BOOT, CODE, str(number)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=[number],
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
        theirs.close()
        self.had: dict[str, Any] = {}
        try:
            self.control.send(json.dumps(config | {"control": number, "code": CODE}).encode())
            self._await_start()
        except BaseException:
            self.close()
            raise

    def _await_start(self) -> None:
        ready, _, _ = select.select([self.control], [], [], _START_SECONDS)
        if not ready:
            raise WorkerRefused(f"the fork server did not start within {_START_SECONDS:.0f} s")
        try:
            message = json.loads(self.control.recv(65536) or b"{}")
        except OSError:
            message = {}
        if "unusable" in message:
            raise UserError(message["unusable"])
        if "ready" not in message:
            raise WorkerRefused(message.get("refused") or f"the fork server ended at once: {self.errors()}")
        self.had = message["ready"]

    def errors(self) -> str:
        """Return the last words of the server's stderr."""
        self._errors.seek(0)
        text = self._errors.read().decode("utf-8", "replace").strip()
        return text.splitlines()[-1][:500] if text else f"exit status {self.process.poll()}"

    def start(self, limits: Limits, descriptors: list[int], alone: bool = True) -> None:
        """Start one process, which gets copies of the descriptors; a judge that is not to be `alone` may get more."""
        order = {"limits": vars(limits), "alone": alone}
        socket.send_fds(self.control, [json.dumps(order).encode()], descriptors)

    def stop_program(self) -> None:
        """Ask for the end of the running program; its report follows as for any other end."""
        with contextlib.suppress(OSError):
            self.control.send(b'{"stop": true}')

    def report(self) -> dict[str, Any]:
        """Return the report of the program that ended, or a failure if the server itself has ended."""
        with contextlib.suppress(OSError, ValueError):
            if message := self.control.recv(65536):
                report: dict[str, Any] = json.loads(message)
                return report
        return {"failure": f"the fork server died: {self.errors()}"}

    def close(self) -> None:
        """End the server with everything below it."""
        self.control.close()  # at which the server ends its program, then itself
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._errors.close()

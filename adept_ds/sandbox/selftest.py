"""Attacks that the isolation must stop, tried from inside it before the first program runs."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .packages import site_packages
from .pool import Pool
from .program import Limits, Program, SandboxFailure, Tests
from .worker import ENVIRONMENT, WorkerRefused

_WRONG = "pass with a wrong answer"
LIMITS = Limits(wall_seconds=20.0, cpu_seconds=10.0, memory_mb=256)
_ATTACKS = """
import ctypes, os, signal, socket

def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return None

def write(path):
    try:
        with open(path, "w") as file:
            file.write("x")
        return path
    except OSError:
        return None

def connect(family, address):
    try:
        with socket.socket(family) as connection:
            connection.settimeout(1)
            connection.connect(address)
            return "connected"
    except OSError:
        return None

def send(port):
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
            return connection.sendto(b"x", ("127.0.0.1", port))
    except OSError:
        return None

def reach(pid):
    try:
        os.kill(pid, 0)
        return "reached"
    except OSError:
        return None

def unexpected_variables(expected):
    return sorted(set(os.environ) - set(expected))

def privileges():
    libc = ctypes.CDLL(None)
    return [libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0)]

def new_namespace():
    return ctypes.CDLL(None).unshare(0x10000000)

def trace(pid):
    return ctypes.CDLL(None).ptrace(16, pid, 0, 0)

def entries(folders):
    count = 0
    for folder in folders:
        try:
            count += len(os.listdir(folder))
        except OSError:
            pass
    return count

def processes():
    try:
        return len([name for name in os.listdir("/proc") if name.isdecimal()])
    except OSError:
        return 0
"""


@dataclass(frozen=True)
class Check:
    """One attack and what became of it."""

    name: str
    held: bool
    detail: str


@contextlib.contextmanager
def _targets() -> Iterator[dict[str, object]]:
    """Something of the caller's own for each attack to go for: files, listeners, this very process."""
    name = f"\0adept_ds-{os.getpid()}-{os.urandom(4).hex()}"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        secret = Path(folder, "canary")
        secret.write_text("canary")
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        listeners = []
        for address in (name, str(Path(folder, "socket"))):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(address)
            listener.listen()
            listeners.append(address)
        yield {
            "secret": str(secret),
            "new": str(Path(folder, "new")),
            "tcp": ("127.0.0.1", tcp.getsockname()[1]),
            "udp": udp.getsockname()[1],
            "abstract": listeners[0],
            "path": listeners[1],
            "home": os.path.expanduser("~/.profile"),
        }


def run_checks(pool: Pool, isolated: bool = True) -> list[Check]:
    """Try to get a wrong answer past the judge and, if programs are `isolated`, every attack on what isolates them.

    All is well if each check holds. Raises WorkerRefused if one cannot run.
    """
    with _targets() as t:
        pid = os.getpid()
        attacks = {
            "read a file of the user": f"read({t['secret']!r}) is None",
            "write beside it": f"write({t['new']!r}) is None",
            "see installed packages": f"entries({site_packages()}) == 0",
            "connect by TCP": f"connect({int(socket.AF_INET)}, {t['tcp']!r}) is None",
            "send by UDP": f"send({t['udp']!r}) is None",
            "connect to an abstract socket": f"connect({int(socket.AF_UNIX)}, {t['abstract']!r}) is None",
            "connect to a socket file": f"connect({int(socket.AF_UNIX)}, {t['path']!r}) is None",
            "signal the grader": f"reach({pid}) is None",
            "trace the grader": f"trace({pid}) == -1",
            "see processes of the host": "processes() <= 3",
            "inherit the environment": f"unexpected_variables({[*ENVIRONMENT, 'LC_CTYPE', 'PWD']}) == []",
            "gain privileges": "privileges() == [1, 2]",
            "make a user namespace": "new_namespace() == -1",
        }
        programs = [
            Program(name, _ATTACKS, Tests(asserts=(f"assert {assertion}",), reference=_ATTACKS))
            for name, assertion in attacks.items()
            if isolated
        ]
        programs.append(Program(_WRONG, "def one():\n    return 2", Tests(asserts=("assert one() == 1",))))
        try:
            verdicts = [verdict for _, verdict in pool.run(programs)]
        except SandboxFailure as failure:
            raise WorkerRefused(str(failure)) from None
    checks = []
    for verdict in verdicts:
        # The filter answers some attacks by killing the process, which stops them too.
        killed = verdict.status == "error" and verdict.kind == "signal" and verdict.id == "signal the grader"
        wanted = "failed" if verdict.id == _WRONG else "passed"
        checks.append(Check(verdict.id, verdict.status == wanted or killed, verdict.detail))
    return checks

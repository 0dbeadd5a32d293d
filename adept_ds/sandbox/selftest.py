"""Attacks that the isolation must stop, tried from inside it before the first program runs.

What came of one is read from the answer of its process itself, without the judging of programs and without asserts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .packages import site_packages
from .pool import Launch, Pool
from .program import Limits, Program, SandboxFailure, Tests
from .run import last_message, start
from .worker import ENVIRONMENT, Worker, WorkerRefused

LIMITS = Limits(wall_seconds=20.0, cpu_seconds=10.0, memory_mb=256)
_ATTACKS = """
import ctypes, os, resource, signal, socket

others = {1, os.getppid()} - {0}

def tried(*calls):
    # how many were not refused
    count = 0
    for call, *arguments in calls:
        try:
            count += call(*arguments) != -1
        except OSError:
            pass
    return count

def writable(paths):
    return tried(*[(os.open, path, os.O_WRONLY) for path in paths])

def limit_others():
    prlimit, pair = ctypes.CDLL(None).prlimit, (ctypes.c_ulong * 2)(1 << 26, 1 << 26)
    return tried(*[(prlimit, pid, kind, pair, None) for pid in others for kind in (0, 2, 6, 7, 9)])

def slow_others():
    calls = [(os.setpriority, os.PRIO_PROCESS, pid, 19) for pid in others]
    calls += [(os.setpriority, kind, 0, 19) for kind in (os.PRIO_PGRP, os.PRIO_USER)]
    calls += [(os.sched_setaffinity, pid, {min(os.sched_getaffinity(0))}) for pid in others]
    return tried(*calls, *[(os.sched_setscheduler, pid, os.SCHED_IDLE, os.sched_param(0)) for pid in others])

def end_others():
    for pid in others:
        os.kill(pid, signal.SIGKILL)
    return 0

def state():
    limits = [resource.getrlimit(kind) for kind in range(resource.RLIM_NLIMITS)]
    return str([limits, os.getpriority(os.PRIO_PROCESS, 0), sorted(os.sched_getaffinity(0)), os.sched_getscheduler(0)])

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


def _value(worker: Worker, expression: str) -> tuple[str | None, str]:
    """Return what an expression is inside, as text, or None, and then what became of its process.

    Raises WorkerRefused if the process could not be had, or took the server along.
    """
    source = f"{_ATTACKS}\nraise SystemExit(str({expression}))"
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            start(worker, LIMITS, [theirs.fileno()], {"source": source, "tests": {}})
        report = worker.report()
        answer = last_message(ours) or {}
    if "failure" in report:
        raise WorkerRefused(str(report["failure"]))
    if answer.get("raised") == "exit":
        return str(answer["text"]), ""
    if os.WIFSIGNALED(report["status"] or 0) and os.WTERMSIG(report["status"]) == signal.SIGSYS:
        return None, "killed for it"
    return None, str(answer or report)


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


_KILLED_FOR = ("signal the grader", "end other processes")
_SETTINGS = ("kernel/core_pattern", "kernel/modprobe", "kernel/ns_last_pid", "kernel/hostname", "vm/drop_caches")


def check_judge(launch: Launch) -> Check:
    """Try to get a wrong answer past the judge. Raises WorkerRefused if that cannot be tried."""
    pool = Pool(launch, 1, LIMITS)
    try:
        program = Program("wrong", "def one():\n    return 2", Tests(asserts=("assert one() == 1",)))
        ((_, verdict),) = pool.run([program])
    except SandboxFailure as failure:
        raise WorkerRefused(str(failure)) from None
    finally:
        pool.close()
    return Check("pass with a wrong answer", verdict.status == "failed" and not verdict.in_process, verdict.detail)


def run_checks(worker: Worker) -> list[Check]:
    """Try every attack on `worker`; the isolation holds if each check does. Raises WorkerRefused if one cannot run."""
    settings = [f"/proc/sys/{name}" for name in _SETTINGS]
    settings += ["/proc/sysrq-trigger", "/proc/1/oom_score_adj", "/sys/kernel/uevent_helper", "/sys/power/state"]
    with _targets() as t:
        pid = os.getpid()
        attacks = {
            "read a file of the user": f"read({t['secret']!r}) is None",
            "write beside it": f"write({t['new']!r}) is None",
            "see installed packages": f"entries({site_packages()}) == 0",
            "write the kernel's settings": f"writable({settings}) == 0",
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
            "change limits of other processes": "limit_others() == 0",
            "slow other processes down": "slow_others() == 0",
            "end other processes": "end_others()",
        }
        before = _value(worker, "state()")
        checks = []
        for name, expression in attacks.items():
            value, detail = _value(worker, expression)
            # The filter answers some attacks by killing the process, which stops them too.
            held = value == "True" or (name in _KILLED_FOR and detail == "killed for it")
            checks.append(Check(name, held, value or detail))
        after = _value(worker, "state()")
        checks.append(Check("change what later programs inherit", before == after, f"{before} became {after}"))
        return checks

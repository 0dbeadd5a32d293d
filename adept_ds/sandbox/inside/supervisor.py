"""The parent of one program: sets its limits, watches the whole tree of its processes, and leaves nothing of it behind.

Part of the fork server. Where the tier has namespaces every program has its own pid namespace, whose end ends every
process in there, wherever it went; elsewhere the server is the child subreaper that all of them fall back to.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from . import landlock, namespaces, seccomp

PROTOCOL_EXIT = 121  # the candidate's side ends so when its channel to the grader is gone
_TICK = os.sysconf("SC_CLK_TCK")
_WATCH_SECONDS = 0.04
# Older kernels would count all processes that the user has on the machine.
_COUNTED_PER_NAMESPACE = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2]) >= (5, 14)
_DRAIN_BYTES = 1 << 16
# Of /proc/PID/status and /proc/PID/smaps_rollup: what a process holds, and its part of what several hold.
_HELD = (b"RssAnon", b"RssShmem", b"VmPTE", b"VmSwap", b"HugetlbPages")
_SHARE = (b"Pss", b"SwapPss", b"Shared_Hugetlb", b"Private_Hugetlb")
with socket.socket(socket.AF_UNIX) as _socket:
    _BUFFER_BYTES = {"pipe": 1 << 16, "socket": _socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)}


class Stopped(Exception):
    """The program must end; the text is the reason."""


class _Watch:
    """Memory, CPU time and number of the program's processes, read from /proc."""

    def __init__(self, limits: dict[str, Any], init: int | None, scratch: str | None) -> None:
        self.limits, self.init, self.scratch = limits, init, scratch
        self.ended_before = _cpu_of_ended()
        self.shared: list[int] = []
        self.shared_bytes = 0
        self.peak_mb = 0.0
        self.cpu_seconds = 0.0

    def processes(self) -> list[int]:
        """Return the program's processes: in a pid namespace of the server's own all but two, else its descendants."""
        me = os.getpid()
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        if self.init is not None:
            return [pid for pid in pids if pid not in (me, self.init)]
        parents = {}
        for pid in pids:
            with contextlib.suppress(OSError):
                parents[pid] = int(_stat(pid)[1])
        found = [me]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found[1:]

    def look(self) -> None:
        """Raise `Stopped` if the tree as a whole is over a limit."""
        pids = self.processes()
        cpu = _cpu_of_ended() - self.ended_before
        resident: dict[str, int] = {}
        buffers: dict[str, int] = {}
        for pid in pids:
            # One after another: what ends meanwhile has its time counted elsewhere, and no memory.
            with contextlib.suppress(OSError, IndexError):
                cpu += sum(int(field) for field in _stat(pid)[11:15]) / _TICK
                # The process's own entry is empty once its first thread has ended, and shows only that one's files.
                tasks = [f"/proc/{pid}/task/{name}" for name in os.listdir(f"/proc/{pid}/task")]
                sizes = {task: size for task in tasks if (size := _sizes(f"{task}/status", _HELD))}
                for task in sizes:
                    self.find_buffers(task, buffers)
                resident |= list(sizes.items())[:1]
        elsewhere = self.scratch_bytes() + sum(buffers.values())
        memory, limit = elsewhere + sum(resident.values()), self.limits["memory_mb"] * 2**20
        if memory > limit and len(resident) > 1:
            # Pages shared since a fork were counted once for each process; the kernel's exact figure costs more.
            memory = elsewhere + sum(_sizes(f"{task}/smaps_rollup", _SHARE) or size for task, size in resident.items())
        self.peak_mb = max(self.peak_mb, memory / 2**20)
        self.cpu_seconds = max(self.cpu_seconds, cpu)
        if memory > limit:
            raise Stopped("memory")
        if cpu > self.limits["cpu_seconds"]:
            raise Stopped("timeout")
        # Where the kernel does not enforce this, being caught here is what a program gets.
        if len(pids) > self.limits["processes"]:
            raise Stopped("violation")

    def ended(self) -> None:
        """Take the final figures, once no process is left; raises `Stopped` if they are over the limit."""
        self.cpu_seconds = max(self.cpu_seconds, _cpu_of_ended() - self.ended_before)
        if self.cpu_seconds > self.limits["cpu_seconds"]:
            raise Stopped("timeout")

    def find_buffers(self, task: str, buffers: dict[str, int]) -> None:
        """Add the pipes and sockets that a thread has open, each with what the kernel may keep for it."""
        try:
            names = os.listdir(f"{task}/fd")
        except OSError:  # it made itself unreadable
            buffers[task] = self.limits["open_files"] * max(_BUFFER_BYTES.values())
            return
        for name in names:
            with contextlib.suppress(OSError):
                target = os.readlink(f"{task}/fd/{name}")
                buffers[target] = _BUFFER_BYTES.get(target.partition(":")[0], 0)

    def map_shared(self, size: int) -> None:
        """Note a shared mapping; raises `Stopped` if all that exist may hold more than the limit.

        Its pages are kept until its last part is unmapped, also those that no process shows as its own.
        """
        self.shared.append(size)
        self.shared_bytes += size
        limit = self.limits["memory_mb"] * 2**20
        if self.shared_bytes > limit:
            pids = self.processes()
            # Besides those that are there, each other thread may be about to make one that it was allowed to.
            kept = len({part for pid in pids for part in _shared_mappings(pid)}) + sum(map(_threads, pids)) - 1
            self.shared = [*sorted(self.shared[:-1], reverse=True)[: max(kept, 0)], size]
            self.shared_bytes = sum(self.shared)
            if self.shared_bytes > limit:
                raise Stopped("memory")

    def scratch_bytes(self) -> int:
        """Return what the program's scratch folder holds; it is memory too."""
        with contextlib.suppress(OSError):
            if self.scratch is not None:
                info = os.statvfs(self.scratch)
                return (info.f_blocks - info.f_bfree) * info.f_frsize
        return 0


def _stat(pid: int) -> list[bytes]:
    """Return the fields of /proc/PID/stat behind the process's name, which may be any bytes."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def _cpu_of_ended() -> float:
    """Return the CPU seconds of all processes that this one has reaped, with those that they had reaped."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _sizes(path: str, names: tuple[bytes, ...]) -> int:
    """Return the sum, in bytes, of some sizes in a file of /proc; 0 if its process has ended."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.partition(b":")[0] in names)
    return 0


def _threads(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/task"))
    return 0


def _shared_mappings(pid: int) -> Iterator[bytes]:
    """Return the numbers of the shared mappings of a process that have no file."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
        for line in file:
            if line.endswith(b"/dev/zero (deleted)\n"):
                yield line.split()[4]


def _set_limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _apply_limits(limits: dict[str, Any], own_user_namespace: bool) -> None:
    megabyte = 2**20
    cpu = int(limits["cpu_seconds"]) + 2
    _set_limit(resource.RLIMIT_CPU, cpu)
    # A backstop for one huge allocation; the tree's real use is watched from outside.
    _set_limit(resource.RLIMIT_AS, (limits["memory_mb"] + limits["address_space_extra_mb"]) * megabyte)
    _set_limit(resource.RLIMIT_FSIZE, limits["file_size_mb"] * megabyte)
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_STACK, 8 * megabyte)
    _set_limit(resource.RLIMIT_MEMLOCK, 64 * 1024)
    _set_limit(resource.RLIMIT_MSGQUEUE, 0)
    _set_limit(resource.RLIMIT_SIGPENDING, 256)
    if own_user_namespace and _COUNTED_PER_NAMESPACE:
        _set_limit(resource.RLIMIT_NPROC, limits["processes"])


class Supervisor:
    """Starts programs, one at a time, and reports how each ended.

    `control` is the grader's socket: a message on it while a program runs asks for the program's end, its closing for
    the server's. `config` is the worker's configuration (`tier`, `seccomp`).
    """

    def __init__(self, control: int, config: dict[str, Any]) -> None:
        self.control, self.config = control, config
        self.in_namespaces = "binds" in config
        self.parent = os.getppid()
        self.wake, waker = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _nothing)
        if config["seccomp"] is not None:
            for level in {config["seccomp"], "compute"}:
                seccomp.program(level, 0)  # its long part is made here, once, not in every child
        self.pids = namespaces.PidNamespaces() if self.in_namespaces else None
        self.folders = namespaces.fixed_folders() if self.in_namespaces else []
        self.has_nobody = namespaces.has_two_users()
        self.mappings: int | None = None

    def watch_mappings(self) -> None:
        """From now on be asked before any process maps shared memory, where the kernel can; this one must not."""
        if self.config["seccomp"] is not None:
            self.mappings = seccomp.ask_before_shared_mappings()

    def orphaned(self) -> bool:
        """Tell whether the process that started this one is gone."""
        return os.getppid() != self.parent

    def run(
        self, given: list[int], limits: dict[str, Any], serve: Callable[[list[int]], None], fresh: bool = True
    ) -> dict[str, Any]:
        """Run one program in a new process, in which `serve(descriptors)` is called; returns the report.

        `given` are the descriptors that it gets, under other numbers; they are closed here.

        With `fresh` it has namespaces of its own where the tier has any. Without, it lives in the server's, as nobody
        and under the filter that allows only computing: it has no files and cannot start processes, so that nothing has
        to be made or cleaned for it. Limits are the same.

        The report has `reason` (None, "timeout", "memory", "output", "violation" or "stopped"), `status` (as from
        waitpid, or None), `seconds`, `cpu_seconds`, `peak_mb`; it is only a `failure` if the isolation could not be
        had. No process of the program is left when this returns.
        """
        output, writer = os.pipe()
        trouble, teller = os.pipe()
        pids = self.pids if fresh else None
        init = pids.open() if pids is not None else None
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            try:
                homes = self.become_candidate(given, writer, teller, limits, fresh)
                os.close(teller)  # from here on the program could write to it
                serve(homes)
            except BaseException as error:
                os.write(teller, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(1)
        if pids is not None:
            pids.leave()
        os.close(writer)
        os.close(teller)
        for descriptor in given:
            os.close(descriptor)
        os.set_blocking(output, False)
        os.set_blocking(trouble, False)
        watch = _Watch(limits, init, f"/proc/{child}/root/tmp" if init is not None else None)
        reason = status = None
        try:
            status, usage = self.wait(child, output, watch, started + limits["wall_seconds"])
            watch.peak_mb = max(watch.peak_mb, usage.ru_maxrss / 1024)
        except Stopped as stop:
            reason = str(stop)
        seconds = time.monotonic() - started
        if pids is not None:
            pids.end()
        _end_children(watch)
        try:
            watch.ended()
        except Stopped as stop:
            reason = reason or str(stop)
        os.close(output)
        failure = _told(trouble)
        if failure:
            return {"failure": f"the isolation of a program could not be set up: {failure}"}
        cpu, peak = round(watch.cpu_seconds, 3), round(watch.peak_mb, 1)
        return {"reason": reason, "status": status, "seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak}

    def become_candidate(
        self, given: list[int], output: int, teller: int, limits: dict[str, Any], fresh: bool
    ) -> list[int]:
        """Turn this process into the candidate's: descriptors, limits, rights, filter. Returns the numbers of `given`.

        Only the standard descriptors, these and `teller` stay open.
        """
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        if self.in_namespaces and fresh:
            namespaces.renew(limits["scratch_mb"], limits["scratch_files"], self.folders)
        _set_limit(resource.RLIMIT_NOFILE, limits["open_files"])
        os.dup2(output, 1)
        os.dup2(output, 2)
        # The highest numbers: a program that closes what it finds begins below.
        first = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(given)
        homes = list(range(first, first + len(given)))
        for descriptor, home in zip(given, homes, strict=True):
            os.dup2(descriptor, home, inheritable=False)
        os.closerange(3, teller)
        os.closerange(teller + 1, first)
        os.closerange(first + len(given), 1 << 16)
        level = self.config["seccomp"] if fresh or self.config["seccomp"] is None else "compute"
        os.chdir("/" if level == "compute" else "/tmp")
        os.umask(0o077)
        _apply_limits(limits, self.in_namespaces)
        if self.config["tier"] != "none":
            namespaces.become_nobody(self.has_nobody)
        namespaces.libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # the server's end is this process's too
        namespaces.libc.prctl(4, 1, 0, 0, 0)  # dumpable again: a program may look at its own /proc entries
        seccomp.no_new_privs()
        if level == "compute":
            landlock.deny_everything()
        if level is not None:
            seccomp.install(seccomp.program(level, os.getpid()))
        random.seed(0)
        gc.enable()
        return homes

    def wait(self, child: int, output: int, watch: _Watch, deadline: float) -> tuple[int, resource.struct_rusage]:
        """Wait for the child's end while reading away the output and looking after the limits; raises `Stopped`."""
        poll = select.poll()
        for descriptor in (self.wake, output, self.control, self.mappings):
            if descriptor is not None:
                poll.register(descriptor, select.POLLIN)
        left = watch.limits["output_bytes"]
        next_look = time.monotonic() + _WATCH_SECONDS
        while True:
            events = poll.poll(max(0.0, min(next_look, deadline) - time.monotonic()) * 1000 + 1)
            for descriptor, event in events:
                if descriptor == output:
                    if event & select.POLLIN:
                        left -= _drain(output, left)
                    else:
                        poll.unregister(output)
                elif descriptor == self.mappings:
                    seccomp.answer(descriptor, watch.map_shared)
                elif descriptor == self.control:
                    os.read(self.control, 4096)  # "stop", or nothing at the grader's end
                    raise Stopped("stopped")
                else:
                    os.read(self.wake, 4096)
                    status, usage = _reap(child)
                    if status is not None:
                        _drain(output, left)
                        return status, usage
            now = time.monotonic()
            if now >= deadline:
                raise Stopped("timeout")
            if now >= next_look:
                if self.orphaned():
                    raise Stopped("stopped")
                watch.look()
                next_look = time.monotonic() + _WATCH_SECONDS


def _nothing(*_: Any) -> None:
    """Handle SIGCHLD: only its byte on the wake-up pipe matters."""


def _reap(child: int) -> tuple[int | None, resource.struct_rusage]:
    """Collect ended processes; returns the child's status once it is among them."""
    while True:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid == child:
            return status, usage
        if pid == 0:
            return None, usage


def _told(trouble: int) -> str:
    """Return what the child said of its setup, and close the pipe; empty if it had no trouble."""
    try:
        return os.read(trouble, 500).decode("utf-8", "replace")
    except BlockingIOError:  # a process of an older namespace may still hold the other end
        return ""
    finally:
        os.close(trouble)


def _drain(output: int, left: int) -> int:
    """Read what the pipe holds now; raises `Stopped` once more than `left` bytes came."""
    total = 0
    with contextlib.suppress(BlockingIOError):
        while data := os.read(output, _DRAIN_BYTES):
            total += len(data)
            if total > left:
                raise Stopped("output")
    return total


def _end_children(watch: _Watch) -> None:
    """Kill and reap every descendant; orphans fall back to this process, so the loop ends when none is left."""
    while True:
        if watch.init is None:
            for pid in watch.processes():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return

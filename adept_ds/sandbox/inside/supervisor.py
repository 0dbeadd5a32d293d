"""The parent of one program: sets its limits, watches the whole tree of its processes, and leaves nothing of it behind.

Part of the fork server. The judge's process is started here too, and may serve several programs, each under the same
limits. Where the tier has namespaces every program has its own pid namespace, whose end ends every
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


class _Process:
    """A process that was started: pipes for its output and for trouble with its setup, process 1 of its namespace.

    `station` is where it takes jobs, if it takes more than one.
    """

    def __init__(self, init: int | None, station: socket.socket | None) -> None:
        self.init, self.station = init, station
        self.output, self.writer = os.pipe()
        self.trouble, self.teller = os.pipe()
        self.pid = 0
        self.cpu_seconds = 0.0

    def started(self, pid: int) -> None:
        """Close the other ends."""
        self.pid = pid
        os.close(self.writer)
        os.close(self.teller)
        os.set_blocking(self.output, False)
        os.set_blocking(self.trouble, False)

    def close(self) -> str:
        """Forget it, once it has ended; returns what it said of its setup, empty if it had no trouble."""
        os.close(self.output)
        if self.station is not None:
            self.station.close()
        return _told(self.trouble)


class _Watch:
    """Memory, CPU time and number of the program's processes, read from /proc."""

    def __init__(self, limits: dict[str, Any], process: _Process) -> None:
        self.limits, self.init = limits, process.init
        self.scratch = f"/proc/{process.pid}/root/tmp" if process.init is not None else None
        # What it has used for programs before this one is as if it were that of a process that has ended.
        self.ended_before = _cpu_of_ended() + process.cpu_seconds
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


def _cpu_of(pid: int) -> float:
    """Return the CPU seconds of a process that lives: the clock that clock_getcpuclockid(3) names."""
    return time.clock_gettime(~pid << 3 | 2)


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
            for level in (config["seccomp"], "judge"):
                seccomp.program(level, 0)  # its long part is made here, once, not in every child
        self.pids = namespaces.PidNamespaces() if self.in_namespaces else None
        self.folders = namespaces.fixed_folders() if self.in_namespaces else []
        self.has_nobody = namespaces.has_two_users()
        self.mappings: int | None = None
        self.standing: _Process | None = None

    def watch_mappings(self) -> None:
        """From now on be asked before any process maps shared memory, where the kernel can; this one must not."""
        if self.config["seccomp"] is not None:
            self.mappings = seccomp.ask_before_shared_mappings()

    def orphaned(self) -> bool:
        """Tell whether the process that started this one is gone."""
        return os.getppid() != self.parent

    def run(self, given: list[int], limits: dict[str, Any], serve: Callable[[list[int]], None]) -> dict[str, Any]:
        """Run one program in a new process, in which `serve(descriptors)` is called; returns the report.

        `given` are the descriptors that it gets, under other numbers; they are closed here. It has namespaces of its
        own where the tier has any.

        The report has `reason` (None, "timeout", "memory", "output", "violation" or "stopped"), `status` (as from
        waitpid, or None), `seconds`, `cpu_seconds`, `peak_mb`; it is only a `failure` if the isolation could not be
        had. No process of the program is left when this returns.
        """
        started = time.monotonic()
        process = self.start(given, limits, serve)
        for descriptor in given:
            os.close(descriptor)
        return self.watch(process, limits, started, alone=True)

    def run_in_standing(
        self, given: list[int], limits: dict[str, Any], serve: Callable[[list[int]], None], alone: bool
    ) -> dict[str, Any]:
        """Give a job to the one process that serves many, and return the report on it as `run` does.

        `serve([station])` is to take descriptors (`given`) from the socket `station`, time after time, and to write a
        byte there when it is done with them, or to end. It lives in the server's namespaces, as nobody and under the
        filter that allows only computing: no files, no new processes. Limits, the same each time, are those of one job.
        It is ended by the first job that breaks them or that is to be its last (`alone`); the next job gets a new one.
        """
        started = time.monotonic()
        if self.standing is None:
            ours, theirs = socket.socketpair()
            with theirs:
                self.standing = self.start([theirs.fileno()], limits, serve, ours)
        process = self.standing
        assert process.station is not None
        process.cpu_seconds = _cpu_of(process.pid)
        socket.send_fds(process.station, [b"."], given)
        for descriptor in given:
            os.close(descriptor)
        return self.watch(process, limits, started, alone)

    def start(
        self,
        given: list[int],
        limits: dict[str, Any],
        serve: Callable[[list[int]], None],
        station: socket.socket | None = None,
    ) -> _Process:
        """Start a process in which `serve(descriptors)` is called, a fresh one unless it gets jobs from `station`."""
        pids = self.pids if station is None else None
        process = _Process(pids.open() if pids is not None else None, station)
        pid = os.fork()
        if pid == 0:
            try:
                try:
                    homes = self.become_candidate(given, process.writer, process.teller, limits, station is None)
                except BaseException as error:
                    os.write(process.teller, f"{type(error).__name__}: {error}".encode())
                    raise
                os.close(process.teller)  # from here on the program could write to it
                serve(homes)
            finally:
                os._exit(1)
        if pids is not None:
            pids.leave()
        process.started(pid)
        return process

    def watch(self, process: _Process, limits: dict[str, Any], started: float, alone: bool) -> dict[str, Any]:
        """Look after a process until it ends, or is done with a job and may stay; returns the report."""
        watch = _Watch(limits, process)
        reason = status = None
        stays = False
        try:
            status, usage = self.wait(process, watch, started + limits["wall_seconds"])
            if usage is not None:
                watch.peak_mb = max(watch.peak_mb, usage.ru_maxrss / 1024)
            stays = status is None and not alone
        except Stopped as stop:
            reason = str(stop)
        seconds = time.monotonic() - started
        failure = ""
        if not stays:
            try:
                failure = self.end(process, watch)
            except Stopped as stop:
                reason = reason or str(stop)
        if failure:
            return {"failure": f"the isolation of a program could not be set up: {failure}"}
        if status is None and reason is None:
            status = 0
        cpu, peak = round(watch.cpu_seconds, 3), round(watch.peak_mb, 1)
        return {"reason": reason, "status": status, "seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak}

    def end(self, process: _Process, watch: _Watch) -> str:
        """End a process with all that it has started; returns what trouble it had with its setup.

        Raises `Stopped` if the final figures are over the limit.
        """
        if process is self.standing:
            self.standing = None
        if process.init is not None and self.pids is not None:
            self.pids.end()
        _end_children(watch)
        failure = process.close()
        watch.ended()
        return failure

    def become_candidate(
        self, given: list[int], output: int, teller: int, limits: dict[str, Any], fresh: bool
    ) -> list[int]:
        """Turn this process into the candidate's: descriptors, limits, rights, filter. Returns the numbers of `given`.

        One that is not `fresh` is the judge's.

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
        level = self.config["seccomp"] if fresh or self.config["seccomp"] is None else "judge"
        has_files = level in (None, "files")
        os.chdir("/tmp" if has_files else "/")
        os.umask(0o077)
        _apply_limits(limits, self.in_namespaces)
        if fresh:
            _set_limit(resource.RLIMIT_CPU, int(limits["cpu_seconds"]) + 2)
        if self.config["tier"] != "none":
            namespaces.become_nobody(self.has_nobody)
        namespaces.libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # the server's end is this process's too
        namespaces.libc.prctl(4, 1, 0, 0, 0)  # dumpable again: a program may look at its own /proc entries
        seccomp.no_new_privs()
        if not has_files:
            landlock.deny_everything()
        if level is not None:
            seccomp.install(seccomp.program(level, os.getpid()))
        random.seed(0)
        gc.enable()
        return homes

    def wait(
        self, process: _Process, watch: _Watch, deadline: float
    ) -> tuple[int | None, resource.struct_rusage | None]:
        """Wait for the process's end while reading away its output and looking after the limits; raises `Stopped`.

        Returns its status and what it used, or None for both if it is done with a job.
        """
        poll, output = select.poll(), process.output
        station = process.station.fileno() if process.station is not None else None
        for descriptor in (self.wake, output, self.control, self.mappings, station):
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
                elif descriptor == station:
                    if os.read(station, 1):
                        watch.cpu_seconds = _cpu_of(process.pid) - process.cpu_seconds
                        return None, None
                    poll.unregister(station)  # it has ended
                elif descriptor == self.control:
                    os.read(self.control, 4096)  # "stop", or nothing at the grader's end
                    raise Stopped("stopped")
                else:
                    os.read(self.wake, 4096)
                    status, usage = _reap(process.pid)
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

"""Linux namespaces by ctypes: a private, almost empty root file system that holds the interpreter and nothing else.

`enter` makes the namespaces that the fork server lives in; `PidNamespaces` and `renew` give one program its own
processes, mounts and shared memory on top. Everything raises OSError with the step that failed in its text.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
from typing import Any

from . import landlock

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_VM = 0x100
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
NOBODY = 65534
# Made once, in the server: what a child would make after its fork costs it fresh copies of pages.
NUMBERS = {"x86_64": (155, 126), "aarch64": (41, 91)}  # of pivot_root and capset
_PIVOT_ROOT, _CAPSET = NUMBERS.get(os.uname().machine, (-1, -1))
_CAP_HEADER, _NO_CAPABILITY = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
_SET_IDS = 1 << 6 | 1 << 7  # CAP_SETGID, CAP_SETUID
_DEVICES = ("null", "zero", "random", "urandom")
_OWN_PROC = ("/proc/self/maps", "/proc/self/stat", "/proc/self/statm", "/proc/self/status")
_STICKY = {"ST_NOSUID": MS_NOSUID, "ST_NODEV": MS_NODEV, "ST_NOEXEC": MS_NOEXEC}
_STICKY |= {"ST_NOATIME": 1024, "ST_NODIRATIME": 2048, "ST_RELATIME": 1 << 21}

_REFUSALS = {
    errno.ENOSPC: " (the limit sysctl user.max_user_namespaces, or that of another kind there, is 0 or reached)",
    errno.EPERM: " (forbidden here: by a sysctl, AppArmor or SELinux, the container, or since this is a chroot)",
    errno.EINVAL: " (this kernel was built without it)",
}

libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, step: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{step}: {os.strerror(code)}")


def unshare(flags: int, step: str) -> None:
    """Move this process (for pid namespaces: its next children) into new namespaces."""
    try:
        _check(libc.unshare(flags), f"unshare({step})")
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}{_REFUSALS.get(error.errno or 0, '')}") from None


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Call mount(2)."""
    arguments = [text.encode() if text is not None else None for text in (source, target, kind)]
    data = options.encode() if options is not None else None
    _check(libc.mount(*arguments, ctypes.c_ulong(flags), data), f"mount({kind or source or 'flags'} on {target})")


def umount(target: str) -> None:
    """Detach the mount at `target`, with all below it."""
    _check(libc.umount2(target.encode(), MNT_DETACH), f"umount({target})")


def pivot_root(new: str, old: str) -> None:
    """Make `new` the root and put the old one at `old`."""
    _check(libc.syscall(_PIVOT_ROOT, new.encode(), old.encode()), "pivot_root")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def has_two_users() -> bool:
    """Tell whether this process is root and may become `nobody`.

    Root of a user namespace that someone else made may be its only user, and a container's may lack the rights; they
    are treated as any other user.
    """
    with open("/proc/self/uid_map") as file:
        ranges = [[int(field) for field in line.split()] for line in file]
    with open("/proc/self/status") as file:
        (rights,) = (int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    mapped = any(first <= NOBODY < first + count for first, _, count in ranges)
    return os.getuid() == 0 and mapped and rights & _SET_IDS == _SET_IDS


def _map_as_root(parent: int, ready: int) -> None:
    """Outside the new user namespace, as the host's root: map root and nobody, the only two that the sandbox needs."""
    os.read(ready, 1)
    for kind in ("uid", "gid"):
        _write(f"/proc/{parent}/{kind}_map", f"0 0 1\n{NOBODY} {NOBODY} 1\n")


def enter_user_namespace() -> None:
    """Become privileged in a new user namespace; programs run as `nobody` in it."""
    uid, gid = os.getuid(), os.getgid()
    if has_two_users():
        # A map of two users can only be written from outside the new namespace.
        ready, go = os.pipe()
        parent = os.getpid()
        helper = os.fork()
        if helper == 0:
            code = 1
            with contextlib.suppress(OSError):
                _map_as_root(parent, ready)
                code = 0
            os._exit(code)
        unshare(CLONE_NEWUSER, "user")
        os.write(go, b".")
        _, status = os.waitpid(helper, 0)
        os.close(ready)
        os.close(go)
        if status != 0:
            raise OSError(1, "writing uid_map and gid_map as root failed")
        return
    unshare(CLONE_NEWUSER, "user")
    try:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        _write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
    except OSError as error:
        raise OSError(error.errno, f"writing uid_map or gid_map: {error.strerror}") from None


def enter() -> list[str]:
    """Enter all namespaces and return the names of those had. The caller must fork to enter the pid namespace."""
    enter_user_namespace()
    unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWPID, "mount, ipc, uts, pid")
    names = ["user", "mount", "ipc", "uts", "pid"]
    try:
        unshare(CLONE_NEWNET, "net")
        names.append("net")
    except OSError:
        pass  # sites may forbid only these; the seccomp filter refuses every socket anyway
    libc.sethostname(b"sandbox", 7)
    return names


def build_root(config: dict[str, Any]) -> None:
    """Replace the whole file system; runs as process 1 of the new pid namespace, whose /proc it mounts.

    `config` has `binds` (real path of the host to its place inside, read-only), `links` (path to target), `masks`
    (folders to show empty).
    """
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    base = "/tmp"
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,mode=755")
    os.mkdir(base + "/old")
    os.mkdir(base + "/new")
    pivot_root(base, base + "/old")
    os.chdir("/")
    mount("tmpfs", "/new", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    for name in ("tmp", "proc", "dev", "etc", "var"):
        os.mkdir(f"/new/{name}")
    mount("proc", "/new/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for path, place in config["binds"].items():
        target = "/new" + place
        if os.path.isdir("/old" + path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        _bind("/old" + path, target)
    for path in config["masks"]:
        if os.path.isdir("/new" + path):
            mount("tmpfs", "/new" + path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k,nr_inodes=2,mode=755")
    for name in _DEVICES:
        os.close(os.open(f"/new/dev/{name}", os.O_CREAT | os.O_WRONLY))
        mount(f"/old/dev/{name}", f"/new/dev/{name}", None, MS_BIND)
    links = {"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1"}
    links |= {"/dev/stderr": "/proc/self/fd/2", "/dev/shm": "/tmp", "/var/tmp": "/tmp"} | config["links"]
    for path, target in links.items():
        os.makedirs(os.path.dirname("/new" + path), exist_ok=True)
        if not os.path.lexists("/new" + path):
            os.symlink(target, "/new" + path)
    _write("/new/etc/passwd", f"root:x:0:0::/:/bin/false\nnobody:x:{NOBODY}:{NOBODY}::/tmp:/bin/false\n")
    _write("/new/etc/group", f"root:x:0:\nnogroup:x:{NOBODY}:\n")
    os.chdir("/new")
    pivot_root(".", ".")
    umount(".")
    os.chdir("/")
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _bind(source: str, target: str) -> None:
    """Bind `source`, with what is mounted below it, read-only, without set-uid programs and devices."""
    mount(source, target, None, MS_BIND | MS_REC)
    points = [target]
    with open("/new/proc/self/mountinfo") as file:
        for line in file:
            point = line.split()[4].replace("\\040", " ")
            if point.startswith(target + "/"):
                points.append(point)
    for point in points:
        # A mount inherited from a more privileged namespace keeps its flags; leaving one out is refused.
        present = os.statvfs(point).f_flag
        kept = sum(flag for name, flag in _STICKY.items() if present & getattr(os, name, flag))
        mount(None, point, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)


class PidNamespaces:
    """Gives the caller's next child a fresh pid namespace, time after time.

    Process 1 of each is a thread-like clone that shares this process's memory and sleeps in pause(2): it costs no copy
    of the address space, and its end takes every process of the namespace along.
    """

    def __init__(self) -> None:
        self.home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self.stack = ctypes.create_string_buffer(1 << 16)
        self.top = ctypes.c_void_p((ctypes.addressof(self.stack) + len(self.stack)) & ~0xF)
        self.every_signal = ctypes.create_string_buffer(b"\xff" * 128, 128)
        self.usual_signals = ctypes.create_string_buffer(128)
        self.init = 0

    def open(self) -> int:
        """Make the namespace that the next fork will enter; returns its process 1."""
        unshare(CLONE_NEWPID, "pid")
        # Inherited, and all blocked: pause never returns. It reaps nothing: what a parent left behind stays to be seen,
        # and to be counted, until the namespace ends.
        # (By the C library, because Python's own function builds 64 enum members each time.)
        libc.pthread_sigmask(signal.SIG_SETMASK, self.every_signal, self.usual_signals)
        try:
            self.init = libc.clone(libc.pause, self.top, CLONE_VM | signal.SIGCHLD, None)
        finally:
            libc.pthread_sigmask(signal.SIG_SETMASK, self.usual_signals, None)
        _check(min(self.init, 0), "clone")
        return self.init

    def leave(self) -> None:
        """Have later children in the server's own pid namespace again."""
        _check(libc.setns(self.home, CLONE_NEWPID), "setns(pid)")

    def end(self) -> None:
        """End every process of the namespace; process 1 is gone once the caller has reaped its own child in there."""
        os.kill(self.init, signal.SIGKILL)


def fixed_folders() -> list[bytes]:
    """Return the rules for `renew`: what programs may open of the file system that `build_root` made."""
    fresh = ("tmp", "proc")
    return [landlock.folder(entry.path) for entry in os.scandir("/") if entry.name not in fresh and entry.is_dir()]


def renew(scratch_mb: int, scratch_files: int, folders: list[bytes]) -> None:
    """Give the calling process, in a fresh pid namespace, its own /tmp, /proc, and shared memory.

    Of /proc it gets the processes, not the host (the kernel's command line and settings, its boot's number), and of
    itself what does not show where on the host the files lie. Leaves descriptors open.
    """
    unshare(CLONE_NEWNS | CLONE_NEWIPC, "mount, ipc")
    options = f"size={scratch_mb}m,nr_inodes={scratch_files},mode=1777"
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options)
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    try:
        mount("proc", "/proc", "proc", flags, "subset=pid")
    except OSError:  # before Linux 5.8
        mount("proc", "/proc", "proc", flags)
    landlock.open_only([*folders, landlock.folder("/tmp"), *(landlock.readable(path) for path in _OWN_PROC)])


def drop_bounding_set() -> None:
    """Make every capability unobtainable by exec, for this process and its children."""
    for capability in range(64):
        if libc.prctl(24, capability, 0, 0, 0) != 0:
            break


def become_nobody(change: bool) -> None:
    """Give up every capability, and if `change` the rights of root and of all groups."""
    if change:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _check(libc.syscall(_CAPSET, _CAP_HEADER, _NO_CAPABILITY), "capset")

"""The system call filter of both architectures, decided call by call, with the kernel's own headers for the numbers."""

from __future__ import annotations

import re
import struct
from functools import cache
from pathlib import Path

import pytest

from adept_ds.sandbox.inside import landlock, namespaces, seccomp

HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
    "aarch64": ("/usr/include/asm-generic/unistd.h",),  # what aarch64 took its table from
}
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
PID = 4321
MACHINES = pytest.mark.parametrize("machine", HEADERS)
LEVELS = pytest.mark.parametrize("level", ["compute", "judge", "files"])

REACHING_OUT = """
socket connect bind listen accept4 ptrace process_vm_readv process_vm_writev vmsplice process_madvise kcmp mount umount2
pivot_root chroot unshare setns move_mount open_tree fsopen clone3 bpf perf_event_open userfaultfd io_uring_setup
io_uring_enter keyctl add_key request_key init_module finit_module delete_module kexec_load reboot swapon
open_by_handle_at name_to_handle_at quotactl acct settimeofday clock_settime adjtimex sethostname setdomainname setuid
setgid setresuid setgroups capset seccomp personality shmget msgget semget mq_open pidfd_getfd pidfd_send_signal
memfd_create memfd_secret landlock_create_ruleset mknodat fanotify_init
"""
OF_FILES_AND_PROCESSES = """
openat execve execveat clone newfstatat unlinkat fchmodat utimensat chdir wait4 sendmsg recvmsg
"""


@cache
def numbers(machine: str) -> dict[str, int]:
    """Return the system calls of an architecture by the kernel's header."""
    path = next((Path(name) for name in HEADERS[machine] if Path(name).is_file()), None)
    if path is None:
        pytest.skip(f"no {HEADERS[machine][0]} (Debian's linux-libc-dev)")
    text = path.read_text()
    found = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    # Calls whose name depends on the size of a word: `#define __NR_newfstatat __NR3264_fstatat`.
    names = re.findall(r"#define __NR_(\w+) __NR3264_(\w+)", text)
    return found | {name: found[other] for name, other in names if other in found}


def decide(code: bytes, machine: str, number: int, *arguments: int) -> int:
    """Return what the filter answers to one call: the BPF program run by hand."""
    padded = [argument & 0xFFFFFFFFFFFFFFFF for argument in (*arguments, 0, 0, 0, 0, 0, 0)][:6]
    data = struct.pack("<iIQ6Q", number, AUDIT[machine], 0, *padded)
    accumulator, at = 0, 0
    program = list(struct.iter_unpack("HBBI", code))
    while True:
        operation, yes, no, value = program[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif operation == 0x06:
            return int(value)
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[operation]
            at += yes if holds else no


def answer(machine: str, level: str, name: str, *arguments: int) -> int:
    return decide(seccomp.program(level, PID, machine), machine, numbers(machine)[name], *arguments)


def allowed(machine: str, level: str) -> set[str]:
    """Return the names of all calls that are allowed with arguments of zero."""
    return {name for name in numbers(machine) if answer(machine, level, name) == seccomp.ALLOW}


@MACHINES
def test_the_tables_have_the_kernels_numbers(machine: str) -> None:
    column = list(HEADERS).index(machine)
    known = numbers(machine)
    for entry in (seccomp._COMPUTE + seccomp._FILES).split():
        name, *columns = entry.split(":")
        assert columns[column] == str(known.get(name, "-")), name
    for name, pair in seccomp._CHECKED.items():
        assert pair[column] == known[name], name
    pivot_root, capset = namespaces.NUMBERS[machine]
    assert (pivot_root, capset) == (known["pivot_root"], known["capset"])
    assert (
        known["landlock_create_ruleset"],
        known["landlock_restrict_self"],
    ) == (landlock._CREATE, landlock._RESTRICT)


@LEVELS
def test_both_architectures_allow_the_same(level: str) -> None:
    common = numbers("x86_64").keys() & numbers("aarch64").keys()
    assert allowed("x86_64", level) & common == allowed("aarch64", level) & common


@MACHINES
@LEVELS
def test_nothing_that_reaches_out_is_allowed(machine: str, level: str) -> None:
    forbidden = set(REACHING_OUT.split()) | (set(OF_FILES_AND_PROCESSES.split()) if level != "files" else set())
    assert allowed(machine, level) & forbidden == ({"recvmsg"} if level == "judge" else set())


@MACHINES
@LEVELS
def test_calls_of_another_architecture_kill(machine: str, level: str) -> None:
    (other,) = HEADERS.keys() - {machine}
    code = seccomp.program(level, PID, machine)
    assert decide(code, other, numbers(machine)["getpid"]) == seccomp.KILL


@LEVELS
def test_x32_calls_are_refused(level: str) -> None:
    code = seccomp.program(level, PID, "x86_64")
    assert decide(code, "x86_64", numbers("x86_64")["getpid"] | 0x40000000) == seccomp.ERRNO | seccomp.EPERM


@MACHINES
def test_without_namespaces_a_program_signals_only_itself_and_starts_only_threads(machine: str) -> None:
    thread = 0x00010000
    assert answer(machine, "compute", "kill", PID, 9) == seccomp.ALLOW
    assert [answer(machine, "compute", "kill", pid, 9) for pid in (1, -1, 0, PID + 1)] == [seccomp.KILL] * 4
    assert answer(machine, "compute", "tgkill", PID + 1, PID + 1, 9) == seccomp.KILL
    assert answer(machine, "compute", "clone", thread) == seccomp.ALLOW
    assert answer(machine, "compute", "clone", 17) != seccomp.ALLOW


@MACHINES
@LEVELS
def test_limits_priority_and_cores_are_changed_only_for_oneself(machine: str, level: str) -> None:
    new, old, refused = 0x7F0000001000, 0x7F0000002000, seccomp.ERRNO | seccomp.EPERM
    for own in (0, PID):
        assert answer(machine, level, "prlimit64", own, 9, new, 0) == seccomp.ALLOW
        assert answer(machine, level, "prlimit64", own, 9, 0, old) == seccomp.ALLOW
        assert answer(machine, "files", "setpriority", 0, own, 5) == seccomp.ALLOW
        assert answer(machine, "files", "sched_setaffinity", own, 8, new) == seccomp.ALLOW
    for other in (1, PID + 1):
        assert answer(machine, level, "prlimit64", other, 9, new, 0) == refused
        assert answer(machine, level, "setpriority", 0, other, 5) == refused
        assert answer(machine, level, "sched_setaffinity", other, 8, new) == refused
    assert [answer(machine, level, "setpriority", kind, 0, 5) for kind in (1, 2)] == [refused] * 2  # group, user


@MACHINES
@LEVELS
def test_a_parent_cannot_have_its_children_forgotten(machine: str, level: str) -> None:
    chld, usr1, action = 17, 10, 0x7F00_0000_0000  # an address whose low half is 0
    assert answer(machine, level, "rt_sigaction", chld, action) == seccomp.ERRNO | seccomp.EPERM
    assert answer(machine, level, "rt_sigaction", chld, 0x1000) == seccomp.ERRNO | seccomp.EPERM
    assert answer(machine, level, "rt_sigaction", chld, 0) == seccomp.ALLOW
    assert answer(machine, level, "rt_sigaction", usr1, action) == seccomp.ALLOW


@MACHINES
@LEVELS
def test_the_only_sockets_are_pairs_of_streams(machine: str, level: str) -> None:
    unix, inet, stream, datagram, cloexec = 1, 2, 1, 2, 0x80000
    assert answer(machine, level, "socketpair", unix, stream | cloexec) == seccomp.ALLOW
    assert answer(machine, level, "socketpair", unix, datagram) != seccomp.ALLOW
    assert answer(machine, level, "socketpair", inet, stream) != seccomp.ALLOW
    assert answer(machine, level, "socket", unix, stream) != seccomp.ALLOW


@MACHINES
@LEVELS
def test_new_namespaces_are_refused(machine: str, level: str) -> None:
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert answer(machine, level, "clone", flag | 0x00010000) != seccomp.ALLOW


@MACHINES
@LEVELS
def test_unknown_calls_look_like_an_older_kernel(machine: str, level: str) -> None:
    code = seccomp.program(level, PID, machine)
    assert decide(code, machine, 999) == seccomp.ERRNO | seccomp.ENOSYS
    assert answer(machine, level, "clone3") == seccomp.ERRNO | seccomp.ENOSYS

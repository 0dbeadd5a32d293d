"""The system calls that a program may make: two allow-lists, for x86-64 and aarch64, as a BPF filter set by prctl.

`compute` is for a process that has no namespaces around it: memory, time, threads, pipes, and the descriptors it was
given; `judge` is the same for one that is given more of them as it goes. `files` adds files and processes, for programs
whose file system, process table and network are private. All refuse every socket but a pair of streams, and what
changes another process's limits, priority or cores; unknown calls answer ENOSYS, so that the C library falls back to
older ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import platform
import struct
from collections.abc import Callable

# name:x86-64:aarch64, a dash where the architecture lacks the call.
_COMPUTE = """
read:0:63 write:1:64 mmap:9:222 munmap:11:215 brk:12:214 futex:202:98 rt_sigprocmask:14:135
rt_sigreturn:15:139 close:3:57 lseek:8:62 fstat:5:80 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 dup:32:23
mremap:25:216 mprotect:10:226 madvise:28:233 mincore:27:232 msync:26:227 rt_sigpending:127:136 rt_sigsuspend:130:133
rt_sigtimedwait:128:137 sigaltstack:131:132 set_robust_list:273:99 get_robust_list:274:100 rseq:334:293
membarrier:324:283 set_tid_address:218:96 clock_gettime:228:113 clock_getres:229:114 clock_nanosleep:230:115
nanosleep:35:101 gettimeofday:96:169 time:201:- times:100:153 getitimer:36:102 setitimer:38:103 alarm:37:- pause:34:-
timer_create:222:107 timer_settime:223:110 timer_gettime:224:108 timer_getoverrun:225:109 timer_delete:226:111
getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177
getresuid:118:148 getresgid:120:150 getgroups:115:158 getpgid:121:155 getpgrp:111:- getsid:124:156 getrlimit:97:163
getrusage:98:165 getpriority:140:141 getrandom:318:278 uname:63:160 sysinfo:99:179 getcpu:309:168 sched_yield:24:124
sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125
sched_get_priority_min:147:126 poll:7:- ppoll:271:73 select:23:- pselect6:270:72 epoll_create:213:- epoll_create1:291:20
epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22 eventfd:284:- eventfd2:290:19 pipe:22:- pipe2:293:59 exit:60:93
exit_group:231:94 restart_syscall:219:128 arch_prctl:158:- getcwd:79:17 umask:95:166 sendto:44:206 recvfrom:45:207
shutdown:48:210 getsockname:51:204 getpeername:52:205 getsockopt:55:209
"""
_FILES = """
open:2:- openat:257:56 openat2:437:437 creat:85:- access:21:- faccessat:269:48 faccessat2:439:439 stat:4:- lstat:6:-
newfstatat:262:79 statx:332:291 readlink:89:- readlinkat:267:78 chdir:80:49 fchdir:81:50 getdents:78:-
getdents64:217:61 mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:- renameat:264:38
renameat2:316:276 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36 truncate:76:45 ftruncate:77:46 fallocate:285:47
fsync:74:82 fdatasync:75:83 flock:73:32 chmod:90:- fchmod:91:52 fchmodat:268:53 utime:132:- utimes:235:-
utimensat:280:88 futimesat:261:- statfs:137:43 fstatfs:138:44 copy_file_range:326:285 sendfile:40:71 preadv:295:69
pwritev:296:70 preadv2:327:286 pwritev2:328:287 fadvise64:221:223 readahead:187:213 splice:275:76 tee:276:77
getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12 flistxattr:196:13 dup2:33:-
dup3:292:24 close_range:436:436 fork:57:- vfork:58:- execve:59:221 execveat:322:281 wait4:61:260 waitid:247:95
setpgid:109:154 setsid:112:157 setrlimit:160:164 timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87
signalfd:282:- signalfd4:289:74 pidfd_open:434:434 mlock:149:228 munlock:150:229 mlock2:325:284 sendmsg:46:211
recvmsg:47:212
"""
_LEVELS = {"compute": _COMPUTE, "judge": _COMPUTE + "recvmsg:47:212", "files": _COMPUTE + _FILES}
_CHECKED = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "prctl": (157, 167),
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "prlimit64": (302, 261),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "rt_sigaction": (13, 134),
    "socket": (41, 198),
    "socketpair": (53, 199),
}
_MMAP, _SECCOMP = (9, 222), (317, 277)
_MACHINE = platform.machine()
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

ALLOW, KILL, ERRNO, _ASK = 0x7FFF0000, 0x80000000, 0x00050000, 0x7FC00000
EPERM, EACCES, ENOSYS, ENOTTY = 1, 13, 38, 25
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
# Offsets in struct seccomp_data; the low halves of 64-bit arguments.
_NR, _ARCH, _ARG0, _ARG1, _ARG2, _ARG3 = 0, 4, 16, 24, 32, 40
_HIGH = 4
_NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW* flag that clone() takes
_MAP_SHARED = 1
_CLONE_THREAD = 0x00010000
_FIRST_UNKNOWN = 424
_OWN_PID = 0x5EC0C0DE
_TTY_FREE_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIO(N)CLEX
_STREAM = (1, 0x801, 0x80001, 0x80801)  # SOCK_STREAM, with SOCK_NONBLOCK and SOCK_CLOEXEC: sends to its pair only
_SIGCHLD = 17
_PLAIN_PRCTL = (3, 15, 16, 21, 23, 27, 39)  # only reads, and the thread's name
_PLAIN_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)  # dup, descriptor and status flags, locks, cloexec dup, pipe size


_libc = ctypes.CDLL(None, use_errno=True)


def supported() -> bool:
    """Tell whether this machine's architecture has a filter."""
    return _MACHINE in _ARCHITECTURES


def _statement(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value & 0xFFFFFFFF)


def _case(value: int, body: list[bytes]) -> list[bytes]:
    """`body` for the call numbered `value`, skipped for every other; the body must end in a return."""
    return [_statement(_JEQ, value, 0, len(body)), *body]


def _require(offset: int, values: tuple[int, ...], otherwise: int) -> list[bytes]:
    """Go on if the argument is one of `values`."""
    body = [_statement(_JEQ, value, len(values) - index) for index, value in enumerate(values)]
    return [_statement(_LOAD, offset), *body, _statement(_RET, otherwise)]


def _among(offset: int, values: tuple[int, ...], otherwise: int) -> list[bytes]:
    """Allow if the argument is one of `values`."""
    return [*_require(offset, values, otherwise), _statement(_RET, ALLOW)]


def program(level: str, pid: int, machine: str | None = None) -> bytes:
    """Return the filter for one process; see `_program`. Its long part is the same for all, and made once."""
    marked = _program(level, machine or _MACHINE)
    return marked.replace(struct.pack("I", _OWN_PID), struct.pack("I", pid))


@functools.cache
def _program(level: str, machine: str) -> bytes:
    """Return the BPF program for `level` ("compute", "judge" or "files"), with `_OWN_PID` for the process's own number.

    Signals sent to process 1, to "everybody", or (but for level "files") to any other process kill the sender: such a
    program tries to end the grader, and a plain refusal would let it go on unnoticed.
    """
    audit, column = _ARCHITECTURES[machine]
    number = {name: numbers[column] for name, numbers in _CHECKED.items()}
    refuse = _statement(_RET, ERRNO | EPERM)
    allow, kill = _statement(_RET, ALLOW), _statement(_RET, KILL)
    code = [_statement(_LOAD, _ARCH), _statement(_JEQ, audit, 1, 0), kill, _statement(_LOAD, _NR)]
    if column == 0:  # the x32 numbers would pass the comparisons of another table
        code += [_statement(_JGE, 0x40000000, 0, 1), refuse]
    clone = [_statement(_LOAD, _ARG0), _statement(_JSET, _NEW_NAMESPACES, 0, 1), refuse]
    if level == "files":
        signal = [_statement(_LOAD, _ARG0)]
        for target in (1, -1):
            signal += [_statement(_JEQ, target, 0, 1), kill]
        signal.append(allow)
        clone.append(allow)
        priority = [*_require(_ARG0, (0,), ERRNO | EPERM), *_among(_ARG1, (0, _OWN_PID), ERRNO | EPERM)]
        cores = _among(_ARG0, (0, _OWN_PID), ERRNO | EPERM)
    else:
        signal = _among(_ARG0, (_OWN_PID,), KILL)
        clone += [_statement(_JSET, _CLONE_THREAD, 0, 1), allow, refuse]
        priority = cores = [refuse]
    # As getrlimit and setrlimit of the C library make it: for the caller, reading or writing.
    limits = [
        *_require(_ARG0, (0, _OWN_PID), ERRNO | EPERM),
        _statement(_LOAD, _ARG2),
        _statement(_JEQ, 0, 0, 1),
        allow,
        *_among(_ARG3, (0,), ERRNO | EPERM),
    ]
    # A parent that ignores SIGCHLD has its children's CPU time forgotten by the kernel.
    action = [_statement(_LOAD, _ARG0), _statement(_JEQ, _SIGCHLD, 1, 0), allow]
    action += [*_require(_ARG1, (0,), ERRNO | EPERM), *_among(_ARG1 + _HIGH, (0,), ERRNO | EPERM)]
    bodies = {
        "clone": clone,
        "clone3": [_statement(_RET, ERRNO | ENOSYS)],
        "kill": signal,
        "tgkill": signal,
        "tkill": signal,  # names a thread and no process, so only the main thread is known to be the program's own
        "rt_sigqueueinfo": signal,
        "rt_tgsigqueueinfo": signal,
        "prctl": _among(_ARG0, _PLAIN_PRCTL + ((1, 2, 4, 36, 38) if level == "files" else ()), ERRNO | EPERM),
        "ioctl": _among(_ARG1, _TTY_FREE_IOCTLS, ERRNO | ENOTTY),
        "fcntl": _among(_ARG1, _PLAIN_FCNTL, ERRNO | EPERM),
        "prlimit64": limits,
        "socket": [_statement(_RET, ERRNO | EACCES)],
        "setpriority": priority,
        "sched_setaffinity": cores,
        "rt_sigaction": action,
        "socketpair": [*_require(_ARG0, (1,), ERRNO | EACCES), *_among(_ARG1, _STREAM, ERRNO | EACCES)],
    }
    allowed = [entry.split(":")[1 + column] for entry in _LEVELS[level].split()]
    answers = {int(value): [allow] for value in allowed if value != "-"}
    answers |= {number[name]: body for name, body in bodies.items()}
    parts: list[tuple[int, list[bytes]]] = []
    for value in range(max(answers) + 2):
        answer = answers.get(value, [refuse] if value < _FIRST_UNKNOWN else [_statement(_RET, ERRNO | ENOSYS)])
        if not parts or parts[-1][1] != answer:
            parts.append((value, answer))
    return b"".join(code + _search(parts))


def _search(parts: list[tuple[int, list[bytes]]]) -> list[bytes]:
    """Return code that finds the part that a call's number is in: each begins with a number, and its code returns.

    The kernel tries every number when a filter is installed, so going through them one by one would take long.
    """
    if len(parts) == 1:
        return parts[0][1]
    middle = len(parts) // 2
    below = _search(parts[:middle])
    return [_statement(_JGE, parts[middle][0], len(below), 0), *below, *_search(parts[middle:])]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def install(code: bytes) -> None:
    """Put the calling thread under the filter, for good; raises OSError where the kernel refuses."""
    no_new_privs()
    filter_program = _Program(len(code) // 8, code)
    if _libc.prctl(22, 2, ctypes.byref(filter_program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp filter refused: " + os.strerror(ctypes.get_errno()))


def ask_before_shared_mappings() -> int | None:
    """Have this process's children, and what they start, wait for `answer` whenever they map memory to share.

    For good. Returns the descriptor on which they ask, or None before Linux 5.5.
    """
    column = _ARCHITECTURES[_MACHINE][1]
    body = [_statement(_LOAD, _ARG3), _statement(_JSET, _MAP_SHARED, 0, 1), _statement(_RET, _ASK)]
    body.append(_statement(_RET, ALLOW))
    code = b"".join([_statement(_LOAD, _NR), *_case(_MMAP[column], body), _statement(_RET, ALLOW)])
    no_new_privs()
    descriptor = _libc.syscall(_SECCOMP[column], 1, 8, ctypes.byref(_Program(len(code) // 8, code)))
    return descriptor if descriptor >= 0 else None


def answer(descriptor: int, decide: Callable[[int], None]) -> None:
    """Let the process go on that asks first, unless `decide` raises; it is given the size of the mapping."""
    question = bytearray(80)
    try:
        fcntl.ioctl(descriptor, 0xC0502100, question)
        number, size = struct.unpack_from("Q32xQ", question)
        decide(size)
        go_on = struct.pack("QqiI", number, 0, 0, 1)
        while True:
            with contextlib.suppress(InterruptedError):
                fcntl.ioctl(descriptor, 0xC0182101, go_on)
                return
    except OSError:  # it has ended meanwhile
        return


def no_new_privs() -> None:
    """Give up gaining privileges by exec, for good."""
    if _libc.prctl(38, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs refused")

"""Landlock, Linux's file and network rules for unprivileged processes, as a second lock behind the seccomp filter."""

from __future__ import annotations

import ctypes
import struct

_CREATE, _RESTRICT = 444, 446  # the same numbers on x86-64 and aarch64
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # number of file rights by ABI version
_libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """Return the kernel's Landlock ABI, or 0 if it has none."""
    return max(0, int(_libc.syscall(_CREATE, None, 0, 1)))


def deny_everything() -> None:
    """Refuse this process, for good, every file, and where the kernel can, TCP, abstract sockets and foreign signals.

    Needs no_new_privs; descriptors that are open stay usable.
    """
    abi = version()
    if abi == 0:
        return
    files = (1 << _FILE_RIGHTS.get(abi, 16)) - 1
    fields = [files, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0]
    attributes = struct.pack("QQQ", *fields)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _libc.syscall(_CREATE, attributes, len(attributes), 0)
    if ruleset < 0 or _libc.syscall(_RESTRICT, ruleset, 0) != 0:
        raise OSError(ctypes.get_errno(), "Landlock is there and refuses its rules")
    _libc.close(ruleset)

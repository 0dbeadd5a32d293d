"""Landlock, Linux's file and network rules for unprivileged processes, as a second lock behind the seccomp filter."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Iterable

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446  # the same numbers on x86-64 and aarch64
_WRITE_FILE, _READ_FILE, _REFER = 1 << 1, 1 << 2, 1 << 13
_OPENING = _WRITE_FILE | _READ_FILE | _REFER
_RULE = struct.Struct("=Qi")
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # number of file rights by ABI version
_libc = ctypes.CDLL(None, use_errno=True)


@functools.cache
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
    _restrict(struct.pack("QQQ", *fields)[: 8 if abi < 4 else 16 if abi < 6 else 24], [])


def folder(path: str) -> bytes:
    """Return the rule that allows what is in a folder; its descriptor stays open as long as the rule is used."""
    return _RULE.pack(_OPENING, os.open(path, os.O_PATH))


def readable(path: str) -> bytes:
    """Return the rule that allows to read one file; as with `folder` a descriptor stays open."""
    return _RULE.pack(_READ_FILE, os.open(path, os.O_PATH))


def open_only(rules: Iterable[bytes]) -> None:
    """Refuse this process, for good, to open other files than these rules allow.

    Needs no_new_privs or CAP_SYS_ADMIN.
    """
    if version() >= 2:  # the first could not leave renaming from folder to folder allowed
        _restrict(struct.pack("Q", _OPENING), rules)


def _restrict(attributes: bytes, rules: Iterable[bytes]) -> None:
    ruleset = _libc.syscall(_CREATE, attributes, len(attributes), 0)
    refused = [_libc.syscall(_ADD_RULE, ruleset, 1, rule, 0) for rule in rules]
    if ruleset < 0 or any(refused) or _libc.syscall(_RESTRICT, ruleset, 0) != 0:
        raise OSError(ctypes.get_errno(), "Landlock is there and refuses its rules")
    _libc.close(ruleset)

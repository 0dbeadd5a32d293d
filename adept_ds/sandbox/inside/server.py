"""The fork server: one exec'ed interpreter per worker that starts programs, one at a time, each in fresh isolation.

It is told only a program's limits; the program itself goes from the grader to the candidate's process directly, over a
socket that is passed through. So nothing of one program, and no test, is in the memory that the next one inherits.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.abc
import json
import os
import random
import select
import signal
import site
import socket
import sys
import time
import warnings
from importlib.machinery import PathFinder
from typing import Any

from . import candidate, judge, namespaces
from .supervisor import Supervisor

# Imported once here, so that programs which use them start fast; they are found on disk otherwise.
_WARM = [
    "abc",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "time",
    "unicodedata",
]


# Where nothing can be read from disk: parts of packages that their package does not import.
_DEEPER = (
    "concurrent.futures.process",
    "concurrent.futures.thread",
    "email.message",
    "encodings.cp1252",
    "encodings.idna",
    "encodings.latin_1",
    "encodings.punycode",
    "encodings.rot_13",
    "encodings.unicode_escape",
    "encodings.utf_16",
    "encodings.utf_32",
    "importlib.metadata",
    "importlib.resources",
    "logging.config",
    "logging.handlers",
    "unittest.mock",
    "urllib.parse",
    "urllib.request",
    "xml.dom.minidom",
    "xml.etree.ElementTree",
    "xml.sax",
)


_zones: list[Any] = []  # where none can be read from disk: ZoneInfo finds again what somebody holds


class UnusablePackage(Exception):
    """An allowed package cannot be imported; the text says which and why."""


class _PackageFinder(importlib.abc.MetaPathFinder):
    """Finds the allowed packages, each in its folder, and nothing that lies beside them."""

    def __init__(self, folders: dict[str, str]) -> None:
        self.folders = folders

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return where the package is, or None for any other module."""
        return PathFinder.find_spec(name, [self.folders[name]]) if name in self.folders else None


def _import_packages(folders: dict[str, str]) -> dict[str, str]:
    """Import the allowed packages, with the parts that they load at first use; returns their versions."""
    versions = {}
    sys.meta_path.append(_PackageFinder(folders))
    for name in folders:
        try:
            package = importlib.import_module(name)
        except Exception as error:
            raise UnusablePackage(f"sandbox package {name!r} cannot be imported: {error}") from None
        for attribute in dir(package):
            with contextlib.suppress(Exception):
                getattr(package, attribute)
        versions[name] = str(getattr(package, "__version__", "unknown"))
    return versions


def _warm(config: dict[str, Any]) -> dict[str, str]:
    """Import what programs may need; returns the versions of the allowed packages."""
    for name in (*_WARM, *judge.MODULES):
        importlib.import_module(name)
    if config["warm_everything"]:
        skipped = {"antigravity", "this", "idlelib", "tkinter", "turtle", "turtledemo", "lib2to3", "test", "ensurepip"}
        for name in [*sorted(sys.stdlib_module_names - skipped), *_DEEPER]:
            if not name.startswith("_"):
                with contextlib.suppress(ImportError, OSError):
                    importlib.import_module(name)
        zoneinfo = importlib.import_module("zoneinfo")
        _zones.extend(zoneinfo.ZoneInfo(key) for key in zoneinfo.available_timezones())
    with warnings.catch_warnings(action="ignore"):
        versions = _import_packages(config["packages"])
    site.setquit()
    site.sethelper()
    random.seed(0)
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, every page
    gc.disable()
    return versions


def _wait_as_parent(server: int) -> None:
    """Outlive the server by nothing, and the grader neither."""
    parent = os.getppid()
    while True:
        pid, status = os.waitpid(server, os.WNOHANG)
        if pid:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        if os.getppid() != parent:
            os.kill(server, signal.SIGKILL)
        time.sleep(0.05)


def _isolate(config: dict[str, Any]) -> dict[str, Any]:
    """Enter the tier's isolation for the server itself; returns what was had."""
    had: dict[str, Any] = {}
    libc = ctypes.CDLL(None, use_errno=True)
    if config["tier"] == "namespaces":
        had["namespaces"] = namespaces.enter()
        server = os.fork()
        if server:
            os.close(config["control"])
            _wait_as_parent(server)
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)
    if "binds" in config:
        namespaces.build_root(config)
        namespaces.drop_bounding_set()
    else:
        libc.prctl(36, 1, 0, 0, 0)
    if config["tier"] != "none":
        libc.prctl(4, 0, 0, 0, 0)  # not dumpable: no program may look into the server
    return had


def main() -> None:
    """Serve programs until the grader closes the control socket.

    The socket's number is in argv; its first message is the configuration.
    """
    number = int(sys.argv[2])
    control = socket.socket(fileno=number)
    config = json.loads(control.recv(1 << 20))
    os.umask(0o022)
    try:
        had = _isolate(config)
        supervisor = Supervisor(number, config)
    except OSError as error:
        control.send(json.dumps({"refused": str(error)}).encode())
        return
    sys.path[:] = [path for path in sys.path if path != config["code"]]
    sys.argv = ["candidate"]
    try:
        had["packages"] = _warm(config)
    except UnusablePackage as error:
        control.send(json.dumps({"unusable": str(error)}).encode())
        return
    supervisor.watch_mappings()
    control.send(json.dumps({"ready": had}).encode())
    while True:
        # A process that the grader forked may hold the other end open beyond the grader's own death.
        while not select.select([control], [], [], 1.0)[0]:
            if supervisor.orphaned():
                return
        message, descriptors, _, _ = socket.recv_fds(control, 65536, 3)
        if not message:
            return
        if descriptors:  # else it is a "stop" that crossed the report of the program it was meant for
            order = json.loads(message)
            try:
                if config["role"] == "judge":
                    report = supervisor.run_in_standing(descriptors, order["limits"], judge.serve, order["alone"])
                else:
                    report = supervisor.run(descriptors, order["limits"], candidate.serve)
            except OSError as error:
                report = {"failure": str(error)}
            control.send(json.dumps(report).encode())

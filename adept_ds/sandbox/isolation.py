"""Which isolation this machine allows: the tiers, how each is started, and what it is known to protect."""

from __future__ import annotations

from collections.abc import Callable
import functools
import glob
import os
import sys
import sysconfig
from typing import Any

from .program import SandboxUnavailable
from .worker import Worker, WorkerRefused

TIERS = ("namespaces", "seccomp")
"""From the strongest to the weakest that is taken without being asked for; "none" is the fourth."""


def interpreter() -> str:
    """Return the real path of the interpreter behind a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def visible_paths() -> dict[str, Any]:
    """Return what a program sees of the host: `binds` (read-only), `links`, and `masks` (shown as empty folders).

    That is the interpreter, its standard library and the system's shared libraries and programs; never site-packages, in
    which data sets and their answers may lie.
    """
    prefix = os.path.realpath(sys.base_prefix)
    library = os.path.realpath(sysconfig.get_path("stdlib"))
    wanted = [interpreter(), library, os.path.realpath(sysconfig.get_path("platstdlib"))]
    if prefix not in ("/", "/usr"):
        wanted += [f"{prefix}/lib", f"{prefix}/lib64"]
    wanted += ["/usr/bin", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    links = {}
    for path in ("/bin", "/lib", "/lib64"):
        if os.path.islink(path):
            links[path] = os.readlink(path)
        else:
            wanted.append(path)
    binds: list[str] = []
    for path in sorted({path for path in wanted if os.path.exists(path)}, key=len):
        if not any(path == other or path.startswith(other + "/") for other in binds):
            binds.append(path)
    masks = [f"{library}/site-packages", f"{library}/dist-packages"]
    for folder in binds:
        for name in ("site-packages", "dist-packages"):
            masks += glob.glob(f"{folder}/python*/{name}") + glob.glob(f"{folder}/lib/python*/{name}")
    return {"binds": binds, "links": links, "masks": sorted(set(masks))}


def worker_config(tier: str) -> tuple[list[str], dict[str, Any]]:
    """Return the command and the configuration that start a fork server in `tier`."""
    config: dict[str, Any] = {"tier": tier, "seccomp": None, "warm_everything": False}
    if tier == "namespaces":
        config |= visible_paths() | {"seccomp": "files"}
    elif tier == "seccomp":
        config |= {"seccomp": "compute", "warm_everything": True}
    return [interpreter()], config


def choose(name: str) -> tuple[Callable[[], Worker], dict[str, Any]]:
    """Return how to start a worker in the tier `name` ("auto": the best that works), and the description for the results."""
    problems = []
    for tier in TIERS if name == "auto" else (name,):
        command, config = worker_config(tier)
        launch = functools.partial(Worker, command, config)
        try:
            worker = launch()
        except (WorkerRefused, OSError) as error:
            problems.append(f"{tier}: {error}")
            continue
        had = worker.had
        worker.close()
        return launch, {"tier": tier, **had}
    raise SandboxUnavailable("no isolation for model-written programs here; " + "; ".join(problems))

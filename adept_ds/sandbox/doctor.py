"""Tells, tier by tier, what isolation this machine offers and what an administrator can do where it does not.

python -m adept_ds.sandbox.doctor
"""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

from .inside import landlock, seccomp
from .isolation import NOT_COVERED, TIERS, interpreter, probe

_SETTINGS = {
    "/proc/sys/user/max_user_namespaces": "sysctl user.max_user_namespaces; 0 forbids user namespaces",
    "/proc/sys/user/max_net_namespaces": "sysctl user.max_net_namespaces; 0 is fine, network namespaces are not needed",
    "/proc/sys/kernel/unprivileged_userns_clone": "sysctl kernel.unprivileged_userns_clone (Debian); 0 forbids them",
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
        "sysctl kernel.apparmor_restrict_unprivileged_userns (Ubuntu); 1 makes their mounts fail: "
        "set 0, or install bubblewrap with an AppArmor profile that leaves it unconfined but for `userns`"
    ),
}


def main() -> int:
    """Print the report; returns 0 if some tier works, else 1."""
    print(f"kernel {platform.release()} on {platform.machine()}, Python {platform.python_version()} at {interpreter()}")
    for path, meaning in _SETTINGS.items():
        try:
            print(f"  {Path(path).read_text().strip():>8}  {meaning}")
        except OSError:
            continue
    print(f"  {shutil.which('bwrap') or 'no':>8}  bubblewrap on PATH")
    print(
        f"  {landlock.version() or 'no':>8}  Landlock ABI of the kernel (5.19 for all of it, CONFIG_SECURITY_LANDLOCK)"
    )
    print(f"  {'yes' if seccomp.supported() else 'no':>8}  seccomp filter known for this architecture")
    best = None
    for tier in TIERS:
        found = probe(tier)
        works = found.launch is not None
        best = best or (tier if works else None)
        print(f"\n{tier}: {'works' if works else 'does not work: ' + found.problem}")
        if "namespaces" in found.had:
            print(f"  namespaces: {', '.join(found.had['namespaces'])}")
        for check in found.checks:
            print(f"  stopped: {check.name}" if check.held else f"  NOT STOPPED: {check.name}: {check.detail}")
        if works:
            print(f"  not covered: {'; '.join(NOT_COVERED[tier])}")
    print(f"\n'auto' uses: {best or 'nothing; model-written programs are refused here'}")
    return 0 if best else 1


if __name__ == "__main__":
    sys.exit(main())

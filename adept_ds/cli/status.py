"""Where runs stand: waiting in SLURM's queue, training, ended and how, or finished and with which score.

    adept-ds status runs/llama3_8b
    adept-ds status runs/sweep runs/rte --watch
    adept-ds status runs/sweep --json

A sweep's folder, or a folder of run folders, stands for all its runs. Works without SLURM too, from the runs' own
files. Status 1: a run has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from adept_ds.config.command_line import parse_flags
from adept_ds.rank_environment import forget_ranks
from adept_ds.slurm.status import FAILED, RunState, read_states, run_folders

STYLES = {
    "failed": "bold red",
    "finished": "green",
    "running": "cyan",
    "evaluating": "cyan",
    "pending": "yellow",
    "suspended": "yellow",
}
COLUMNS = ("run", "state", "job", "requeued", "step", "steps/s", "left", "GPU h", "loss", "score", "note")
PLAIN_WIDTH = 400
"""Where the output is no terminal, nothing is cut."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All flags."""
    parser.add_argument("run_dir", nargs="+", type=Path, metavar="RUN", help="run folder, or a folder of them")
    parser.add_argument("--watch", action="store_true", help="stay, and renew the table until no run is under way")
    parser.add_argument("--interval", type=float, default=5.0, metavar="SECONDS", help="of --watch (default: 5)")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead")


def table(states: Sequence[RunState]) -> Table:
    """The states as a table."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        is_text = column in ("run", "state", "note", "score")
        result.add_column(column, justify="left" if is_text else "right", overflow="fold", no_wrap=column == "state")
    for state in states:
        left = "" if state.seconds_left is None else str(timedelta(seconds=round(state.seconds_left)))
        cells = [
            state.run,
            state.state,
            state.job or "",
            str(state.requeued or ""),
            "" if state.total_steps is None else f"{state.step}/{state.total_steps}",
            "" if state.steps_per_second is None else f"{state.steps_per_second:.2f}",
            left,
            f"{state.gpu_hours:.1f}" if state.gpu_hours else "",
            "" if state.loss is None else f"{state.loss:.4f}",
            state.score or "",
            state.note,
        ]
        # Not markup: paths and messages have brackets in them.
        result.add_row(*map(Text, cells), style=STYLES.get(state.state, ""))
    return result


def is_under_way(state: RunState) -> bool:
    """Whether a run's state may change by itself."""
    return state.state in ("pending", "starting", "running", "suspended", "evaluating")


def main(arguments: Sequence[str]) -> int:
    """Parse, read, print."""
    flags = parse_flags(arguments, "adept-ds status", __doc__ or "", add_flags)
    forget_ranks(os.environ)  # what a shell has of other launchers' makes no rank of this program
    states = read_states(run_folders(flags.run_dir), warn=lambda text: print(text, file=sys.stderr))
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    if flags.json:
        print(json.dumps([asdict(state) for state in states], indent=2))
    elif flags.watch:
        with Live(table(states), console=console, auto_refresh=False) as live:
            while any(map(is_under_way, states)):
                time.sleep(flags.interval)
                said: list[str] = []
                new = read_states(run_folders(flags.run_dir), warn=said.append)
                # A busy controller may not answer for a while; what it said before is the better knowledge.
                states = states if said else new
                live.update(Group(table(states), *(Text(text, "red") for text in said)), refresh=True)
    else:
        console.print(table(states))
    return int(any(state.state == FAILED for state in states))

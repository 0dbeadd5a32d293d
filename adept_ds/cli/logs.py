"""The logs of a run under SLURM: its newest try's, or another job's of its chain, or one rank's.

    adept-ds logs runs/llama3_8b
    adept-ds logs runs/llama3_8b --follow
    adept-ds logs runs/llama3_8b --kind score
    adept-ds logs runs/llama3_8b --rank 3 --lines 100

Prints the log's path and its last lines. Works without SLURM, from the run's own files.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from adept_ds.config.command_line import parse_count, parse_flags
from adept_ds.rank_environment import forget_ranks
from adept_ds.slurm.logs import find_log
from adept_ds.slurm.submission import KINDS

POLL_SECONDS = 0.5
BLOCK = 65_536


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All flags."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--kind", choices=KINDS, default="train", help="which job of the chain (default: train)")
    parser.add_argument("--rank", type=int, metavar="N", help="that rank's own log (default: the job's)")
    parser.add_argument("--lines", type=parse_count, default=30, metavar="N", help="last lines to print (default: 30)")
    parser.add_argument("--follow", action="store_true", help="stay, and print what is added")


def last_lines(path: Path, count: int) -> bytes:
    """The last lines of a file, which is read from its end."""
    with path.open("rb") as file:
        at, tail = file.seek(0, os.SEEK_END), b""
        while at and tail.count(b"\n") <= count:
            at = file.seek(max(0, at - BLOCK))
            tail = file.read()
    return b"".join(tail.splitlines(keepends=True)[-count:])


def follow(path: Path, at: int) -> None:
    """Print what is added to a file behind `at`, until Ctrl-C."""
    with path.open("rb") as file:
        file.seek(at)
        while True:
            sys.stdout.buffer.write(file.read())
            sys.stdout.buffer.flush()
            time.sleep(POLL_SECONDS)


def main(arguments: Sequence[str]) -> None:
    """Find, print, follow."""
    forget_ranks(os.environ)  # what a shell has of other launchers' makes no rank of this program
    flags = parse_flags(arguments, "adept-ds logs", __doc__ or "", add_flags)
    path = find_log(flags.run_dir, flags.kind, flags.rank)
    print(f"==> {path} <==", flush=True)
    at = path.stat().st_size
    sys.stdout.buffer.write(last_lines(path, flags.lines))
    sys.stdout.buffer.flush()
    if flags.follow:
        with suppress(KeyboardInterrupt):
            follow(path, at)

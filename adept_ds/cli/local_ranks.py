"""Ranks on this machine, each a process of its own, without a launcher's output around theirs.

`--ranks N` starts them. On several machines ranks come from `deepspeed`, torchrun or SLURM.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType

import psutil

from adept_ds.config.command_line import parse_count
from adept_ds.training.stopping import REPEAT_SECONDS, STARTED_BY, stop_signals

GRACE_SECONDS = 20.0
"""The others get so long to end by themselves when a rank has failed: they wait for it, or save."""
POLL_SECONDS = 0.1


def add_ranks_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--ranks`."""
    parser.add_argument(
        "--ranks",
        type=parse_count,
        default=1,
        metavar="N",
        help="processes to start on this machine, one a GPU or a share of the cores each (default: 1)",
    )


def starts_ranks(flags: argparse.Namespace) -> bool:
    """Whether this process is to start ranks rather than to be one."""
    return flags.ranks > 1 and "RANK" not in os.environ


def run_ranks(count: int, command: str, arguments: Sequence[str]) -> int:
    """Run `adept-ds COMMAND ARGUMENTS` on so many ranks; return the first status that is not 0."""
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    # -P: as for a console script, a user's files in this folder are no modules.
    return Children().run([sys.executable, "-P", "-m", "adept_ds", command, *arguments], ranks)


class Children:
    """Processes whose end is waited for. A signal is passed on to them, as SIGTERM: a run decides when it can stop. A
    second one kills them. A rank that outlives this process saves and ends."""

    def __init__(self) -> None:
        self.stopping = False
        self._stopping_since = 0.0
        self._processes: list[subprocess.Popen] = []
        for number in stop_signals():
            signal.signal(number, self._receive)

    def run(self, command: Sequence[str], environments: Sequence[Mapping[str, str]] = ({},)) -> int:
        """Start the command once for each of the environments, which are added to this process's, and wait for all.

        When one fails, the others are ended after `GRACE_SECONDS`.

        Returns:
            The first status that is not 0, else 0; of a process that a signal killed, 128 and the signal's number.
        """
        started_by = {STARTED_BY: f"{os.environ.get(STARTED_BY, '')} {os.getpid()}"}
        # Each in a group of its own, so that a terminal's Ctrl-C reaches it once, by way of this process.
        self._processes = [
            subprocess.Popen(command, env={**os.environ, **started_by, **environment}, start_new_session=True)
            for environment in environments
        ]
        if self.stopping:
            self._signal(signal.SIGTERM)
        failed, deadlines = 0, [GRACE_SECONDS, 2 * GRACE_SECONDS]
        failed_at = 0.0
        while any(process.poll() is None for process in self._processes):
            if not failed:
                failed = next((code for process in self._processes if (code := process.poll())), 0)
                failed_at = time.monotonic()
            elif deadlines and time.monotonic() - failed_at > deadlines[0]:
                self._signal(signal.SIGTERM if len(deadlines) == 2 else signal.SIGKILL)
                del deadlines[0]
            time.sleep(POLL_SECONDS)
        while self.stopping and any(_has_group(process.pid) for process in self._processes):
            # A launcher that the signal has ended leaves its ranks, which are saving.
            time.sleep(POLL_SECONDS)
        status = failed or next((process.returncode for process in self._processes if process.returncode), 0)
        return status if status >= 0 else 128 - status

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.stopping:
            self.stopping, self._stopping_since = True, time.monotonic()
            self._signal(signal.SIGTERM)
        elif time.monotonic() - self._stopping_since > REPEAT_SECONDS:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def _has_group(pid: int) -> bool:
    """Whether any process is left of the group that the process `pid` has led."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

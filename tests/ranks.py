"""Ranks without a launcher: real processes, forked from one that has loaded the libraries once.

A rank spends ten seconds of a core on imports and far less on a tiny model, so tests that are not about how ranks are
started fork them from the fork server of `multiprocessing`. The tests of launchers start them as users do.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

REPOSITORY = Path(__file__).resolve().parent.parent
STREAMS = ("stdout", "stderr")
LIBRARIES = [
    "adept_ds.benchmark",
    "adept_ds.evaluation.mbpp",
    "adept_ds.planner.dry_run",
    "adept_ds.training.recipe",
    "bitsandbytes",
    "peft",
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_server(environment: dict[str, str]) -> None:
    """Have the libraries loaded in `environment`, unless they are already."""
    multiprocessing.set_forkserver_preload(LIBRARIES)
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - environment.keys():
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


def fork_ranks(
    ranks: int,
    script: str,
    *arguments: str,
    environment: dict[str, str],
    logs: Path,
    nodes: int = 1,
    timeout: float = 900,
    folder: Path = REPOSITORY,
) -> subprocess.CompletedProcess[str]:
    """Run a script, or a module, in `folder` on so many ranks, on 0 as plain `python` does; wait for all.

    Returns the ranks' output one after the other, errors after the rest (and alone in `stderr`), and the status of the
    first rank that failed; the others have ten seconds then.
    """
    start_server(environment)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    places = [{"RANK": str(i), "LOCAL_RANK": str(i % (ranks // nodes))} for i in range(ranks)]
    environments = [environment | common | place for place in places] or [environment]
    outputs = {name: [logs / f"{index}.{name}" for index in range(len(environments))] for name in STREAMS}
    for path in itertools.chain(*outputs.values()):
        path.touch()
    context = start_processes(
        _run,
        ([script, *arguments], environments, logs, folder),
        len(environments),
        join=False,
        start_method="forkserver",
    )
    deadline, status, failure = time.monotonic() + timeout, 0, ""
    try:
        while not context.join(max(0.0, deadline - time.monotonic()), grace_period=10):
            if time.monotonic() > deadline:
                status, failure = -9, f"no end in {timeout} s"
                break
    except ProcessExitedException as error:
        status = error.exit_code
    except ProcessRaisedException as error:
        status, failure = 1, error.msg
    finally:
        for process in context.processes:
            process.kill()
    output, errors = ("".join(path.read_text() for path in paths) for paths in outputs.values())
    return subprocess.CompletedProcess([script, *arguments], status, output + errors + failure, errors + failure)


def _run(index: int, command: list[str], environments: list[dict[str, str]], logs: Path, folder: Path) -> None:
    """Become the script, all output in files."""
    gc.freeze()  # collections need not go through the libraries' objects
    for name in STREAMS:
        stream = getattr(sys, name)
        with (logs / f"{index}.{name}").open("w") as log:
            os.dup2(log.fileno(), stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environments[index])
    os.chdir(folder)
    sys.argv = command
    run = runpy.run_path if command[0].endswith(".py") else runpy.run_module
    run(command[0], run_name="__main__")

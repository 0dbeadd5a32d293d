"""How ranks meet, and what they are told where they cannot."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.ranks import REPOSITORY

JOIN = """
from adept_ds.distributed import init_world
from adept_ds.entry_point import run_entry_point
run_entry_point(lambda arguments: init_world() and None)
"""


@pytest.mark.parametrize(
    ("port", "message"),
    [
        (None, "another process of this machine listens at the port where the ranks meet"),
        ("none", "rank 0 cannot meet the others at MASTER_ADDR '127.0.0.1', MASTER_PORT 'none'"),
    ],
)
def test_a_port_that_cannot_be_had_is_named(port: str | None, message: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = port or str(listener.getsockname()[1])
        rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken}
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"} | rank
        done = subprocess.run([sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert taken in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("asked", "threads"), [("1", 1), (None, len(os.sched_getaffinity(0)))])
def test_a_rank_has_the_threads_that_are_asked_for_or_else_its_share_of_the_cores(
    asked: str | None, threads: int
) -> None:
    outside = ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    environment |= {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    environment |= {"OMP_NUM_THREADS": asked} if asked else {}
    show = "import torch; from adept_ds.distributed import init_world; init_world(); print(torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(threads)], done.stderr

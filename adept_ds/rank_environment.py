"""Which rank this process is, by the environment that a launcher sets, or SLURM, whose tasks need no other launcher."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

FIRST_PORT, PORTS = 12_000, 18_000
"""Rendezvous ports lie below those that Linux hands out by itself (from 32768)."""
RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""What makes a process a rank."""


def is_main_rank() -> bool:
    """Whether the launcher made this process rank 0; for use before the process group exists."""
    return int(os.environ.get("RANK") or 0) == 0


def take_slurm_ranks(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in a task of a SLURM step.

    Nothing changes where another launcher has set RANK, or outside `srun`: a batch script has SLURM_NTASKS too, but is
    no rank. What the step itself was started with is no launcher's, but left over in the shell that called `srun`, and
    goes. The address is the step's first node, the port follows from the job, so that jobs on the same nodes, and
    members of a job array, do not meet.
    """
    if _is_left_over(environment):
        forget_ranks(environment)
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environment or tasks == 1:
        return
    tasks_by_node = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = str(tasks)
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = str(tasks_by_node[int(environment["SLURM_NODEID"])])
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + int(environment["SLURM_JOB_ID"]) % PORTS))


def forget_ranks(environment: MutableMapping[str, str]) -> None:
    """Make a process no rank: for programs that have none, whatever a shell has in its environment."""
    for name in RANK_VARIABLES:
        environment.pop(name, None)


def _is_left_over(environment: Mapping[str, str]) -> bool:
    """Whether the ranks' variables are those that the task of the step began with; a launcher within it sets others."""
    try:
        began_with = Path(f"/proc/{int(environment['SLURM_TASK_PID'])}/environ").read_bytes().split(b"\0")
    except (KeyError, ValueError, OSError):
        return False
    theirs = dict(entry.split("=", 1) for entry in map(os.fsdecode, began_with) if "=" in entry)
    return "SLURM_STEP_ID" in environment and all(theirs.get(name) == environment.get(name) for name in RANK_VARIABLES)


def expand_counts(text: str) -> list[int]:
    """Tasks of each node from SLURM's short form: `2(x3),1` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def first_host(node_list: str) -> str:
    """First name of SLURM's short form: `rack[03-05,9]n[1-2],login` is rack03n1."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    if first is None:
        raise ValueError(f"{node_list!r} is not a list of SLURM nodes")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])

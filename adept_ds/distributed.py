"""Ranks: who we are, and the few collective operations that the loop needs."""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from adept_ds.errors import NodeError, UserError
from adept_ds.rank_environment import take_slurm_ranks

Result = TypeVar("Result")

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=60)
"""A hang becomes an exit after this. Scoring on rank 0 while the others wait must fit in."""


class MainRankError(RuntimeError):
    """Rank 0 failed in something that it does for all ranks."""


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0


def on_gpu() -> bool:
    """Whether this process computes on a GPU: there is one, and DS_ACCELERATOR does not ask for the CPU."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def init_world() -> World:
    """Join the process group and take this rank's device. Collective.

    Ranks come from the launcher (`deepspeed`, torchrun), from SLURM's own tasks where RANK is not set, or there is one.

    Raises:
        NodeError: The ranks cannot meet: their port is taken, or nobody answers there.
    """
    environment = os.environ
    take_slurm_ranks(environment)
    # DeepSpeed reads them from here too.
    rank = int(environment.setdefault("RANK", "0"))
    world_size = int(environment.setdefault("WORLD_SIZE", "1"))
    local_rank = int(environment.setdefault("LOCAL_RANK", "0"))
    if on_gpu():
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        # The ranks of this node share its cores; left alone, each would start a thread for every core.
        cores, ranks_here = len(os.sched_getaffinity(0)), int(environment.get("LOCAL_WORLD_SIZE", world_size))
        torch.set_num_threads(max(1, cores // ranks_here))
    if dist.is_initialized():  # by an earlier run of this process
        return World(rank, world_size, local_rank, device)
    if world_size == 1 and "MASTER_ADDR" not in environment:
        # A single process needs no port, so none can clash.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    else:
        try:
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
        except (dist.DistError, ValueError) as error:
            raise NodeError(_no_meeting(rank, environment, error)) from error
    return World(rank, world_size, local_rank, device)


def prepare_deepspeed(world: World) -> None:
    """Make DeepSpeed use the process group that is there. Call before the backbone is loaded."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch has newer ones for, a warning at each.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if world.device.type == "cpu":
        # The shared-memory collective is compiled at first use: it needs a C++ compiler, and a killed build leaves a
        # lock on which every later run hangs. It serves all-reduce only, which moves kilobytes here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False)


def _no_meeting(rank: int, environment: Mapping[str, str], error: Exception) -> str:
    """Why the ranks cannot meet, and what to change."""
    place = f"MASTER_ADDR {environment.get('MASTER_ADDR')!r}, MASTER_PORT {environment.get('MASTER_PORT')!r}"
    if "EADDRINUSE" in str(error):
        return (
            f"another process of this machine listens at the port where the ranks meet ({place}), perhaps another run; "
            "give another port by --master_port to deepspeed and torchrun, or by MASTER_PORT"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"rank {rank} cannot meet the others at {place}: {reason}"


def sum_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """Add the values elementwise over all ranks, in fp64. Collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def gather_objects(value: Any, world: World) -> list[Any]:
    """Return every rank's value, in rank order, on every rank. Collective; for small host objects."""
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def ranks_by_node(world: World) -> list[list[int]]:
    """Return the ranks of each node. Collective. Launchers number the ranks of one node one after the other.

    Raises:
        UserError: The nodes have different numbers of ranks.
    """
    nodes: list[list[int]] = []
    for rank, local_rank in enumerate(gather_objects(world.local_rank, world)):
        if local_rank == 0:
            nodes.append([])
        nodes[-1].append(rank)
    if len({len(ranks) for ranks in nodes}) > 1:
        raise UserError(
            f"the nodes have {', '.join(str(len(ranks)) for ranks in nodes)} ranks; expected as many on every node"
        )
    return nodes


def on_main_rank(function: Callable[[], Result], world: World) -> Result:
    """Run `function` on rank 0 and give its result to every rank. Collective.

    What `function` raises is raised on every rank, a `UserError` or `OSError` as one and anything else as
    `MainRankError`, so that no rank waits for one that has given up.
    """
    outcome: list[Any] = [None, None, None]
    error: Exception | None = None
    if world.is_main:
        try:
            outcome[0] = function()
        except Exception as raised:
            error = raised
            outcome[1:] = [_re_raised(raised), f"rank 0 failed: {raised}"]
    dist.broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[2] is not None:
        raise outcome[1] or MainRankError(outcome[2])
    return outcome[0]


def _re_raised(error: Exception) -> Exception | None:
    """What the other ranks raise for an error of rank 0 by which callers tell what to do; None for any other."""
    if isinstance(error, UserError):
        return UserError(str(error))
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename) if error.errno else OSError(str(error))
    return None


def own_rank() -> int:
    """Rank of this process; 0 where there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def rank_count() -> int:
    """Number of ranks; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_all_ranks(condition: bool) -> bool:
    """Whether the condition holds on every rank. Collective; works without a process group."""
    if rank_count() == 1:
        return condition
    answers: list[bool] = [False] * rank_count()
    dist.all_gather_object(answers, condition)
    return all(answers)

"""Check the nodes of a job before a model is loaded: seconds, where the same fault later costs an hour.

    srun python -m adept_ds.slurm.node_check --config FILE [--section.key VALUE ..]

runs on every rank of the job to come. Every node looks at its GPUs, its local disk, the versions of its packages and
the files that the config names; then all ranks add up a number. What is wrong is told with the node's name, and how to
leave the node out.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub.constants import is_offline_mode

from adept_ds.config.command_line import parse_command_line
from adept_ds.config.run import RunConfig
from adept_ds.distributed import on_gpu
from adept_ds.entry_point import run_entry_point
from adept_ds.errors import NodeError, UserError
from adept_ds.slurm.checks import adapter_problems, path_problems

PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "numpy",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
TIMEOUT = timedelta(seconds=120)
"""For ranks to arrive, packages to be read from a cold network file system included, and for the all-reduce."""
DEFAULT_MIN_FREE_GB = 1.0


@dataclass(frozen=True)
class NodeReport:
    """What one node found on itself."""

    node: str
    problems: tuple[str, ...]
    facts: Mapping[str, str]
    """What must be the same on all nodes."""


def inspect_node(run: RunConfig, environment: Mapping[str, str]) -> NodeReport:
    """Look at this node, without others."""
    return NodeReport(
        node=_this_node(environment),
        problems=(*_gpu_problems(environment), *_disk_problems(environment), *_source_problems(run)),
        facts={
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            **{f"{key} {name}": "there" if Path(name).exists() else "not there" for key, name in sources(run).items()},
        },
    )


def _this_node(environment: Mapping[str, str]) -> str:
    return environment.get("SLURMD_NODENAME") or platform.node()


def _gpu_problems(environment: Mapping[str, str]) -> Iterator[str]:
    if environment.get("DS_ACCELERATOR") == "cpu":
        return
    asked, ranks = int(environment.get("SLURM_GPUS_ON_NODE", "0")), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    visible = torch.cuda.device_count()
    if visible < asked:
        yield f"{visible} GPUs are visible, {asked} were asked for"
    elif 0 < visible < ranks:
        yield (
            f"{visible} GPUs are visible to a rank, but {ranks} ranks run here; expected one GPU a rank, and all of "
            "them visible to each (sbatch --gpus-per-node, not --gpus-per-task)"
        )


def _disk_problems(environment: Mapping[str, str]) -> Iterator[str]:
    scratch = Path(environment.get("ADEPT_DS_SCRATCH", "/tmp"))
    wanted = float(environment.get("ADEPT_DS_MIN_FREE_GB", DEFAULT_MIN_FREE_GB))
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(scratch).free / 1e9
    except OSError as error:
        yield f"ADEPT_DS_SCRATCH {scratch}: {error.strerror}"
        return
    if not os.access(scratch, os.W_OK):
        yield f"ADEPT_DS_SCRATCH {scratch} is not writable"
    if free < wanted:
        yield f"{free:.1f} GB are free on ADEPT_DS_SCRATCH {scratch}, expected {wanted:g} (ADEPT_DS_MIN_FREE_GB)"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _source_problems(run: RunConfig) -> Iterator[str]:
    """Models, adapters and data of the config that this node cannot read."""
    yield from path_problems(run, is_offline_mode())
    yield from adapter_problems(run, is_offline_mode())
    for key, name in sources(run).items():
        if Path(name).exists() and not os.access(name, os.R_OK):
            yield f"{key} is {name!r}, which is not readable"


def sources(run: RunConfig) -> dict[str, str]:
    """Settings that name a hub id, a file or a folder that is read."""
    named = {
        "model.name_or_path": run.model.name_or_path,
        "model.tokenizer": run.model.tokenizer,
        "data.path": run.data.path,
        "data.validation_path": run.data.validation_path,
        **run.method.adapter_folders,
        **{f"data.hub_ids.{name}": source for name, source in run.data.hub_ids.items()},
    }
    return {key: source for key, source in named.items() if source is not None}


def compare(reports: Sequence[NodeReport]) -> dict[str, list[str]]:
    """Problems by node, those that only a comparison shows included.

    Where facts differ, those of most nodes are taken to be right, and of the first node if there are as many others.
    """
    problems: dict[str, list[str]] = {}
    for report in reports:
        found = list(report.problems)
        for name, own in report.facts.items():
            usual = Counter(other.facts[name] for other in reports).most_common(1)[0][0]
            if own != usual:
                where = next(other.node for other in reports if other.facts[name] == usual)
                found.append(f"{name} is {own}, on {where} it is {usual}")
        if found:
            problems[report.node] = found
    return problems


def verdict(problems: Mapping[str, Sequence[str]], nodes: int) -> str:
    """The message: every node with what is wrong, and what to do. A fault of all nodes is none of the nodes'."""
    lines = [f"{node}: {problem}" for node, found in problems.items() for problem in found]
    if len(problems) < nodes:
        lines.append(f"mend it, or leave out such nodes by: sbatch --exclude={','.join(problems)}")
    else:
        lines.append("no node is without a fault, so leaving some out does not help")
    return "the node check failed, nothing was loaded\n" + "\n".join(f"  {line}" for line in lines)


def check_nodes(run: RunConfig, environment: Mapping[str, str]) -> str:
    """Check all nodes and return a line on what was found. Collective over the ranks of the step.

    Raises:
        UserError: A node has a fault, or its ranks cannot be reached.
    """
    rank, world_size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    ranks_here = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    report = inspect_node(run, environment) if int(environment.get("LOCAL_RANK", "0")) == 0 else None
    if world_size == 1:
        assert report
        problems = compare([report])
        if problems:
            raise UserError(verdict(problems, 1))
        return f"node check: {report.node} is good"
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    try:
        # Longer than rank 0 waits for reports: it knows which nodes are silent, and speaks first.
        patience = TIMEOUT if rank == 0 else 1.5 * TIMEOUT
        store = dist.TCPStore(address, port, world_size, rank == 0, timeout=patience, wait_for_workers=False)
    except dist.DistError as error:
        raise NodeError(f"{_this_node(environment)} cannot reach {address}, port {port}: {error}") from None
    if report:
        store.set(f"report/{environment['SLURM_NODEID']}", json.dumps(asdict(report)))
    if rank == 0:
        store.set("verdict", _collect(store, environment["ADEPT_DS_NODES"].split()))
    found = store.get("verdict").decode()
    if found:
        raise UserError(found)
    _all_reduce(store, rank, world_size, ranks_here)
    return f"node check: {environment['ADEPT_DS_NODES']} are good, {world_size} ranks reach each other"


def _collect(store: dist.TCPStore, nodes: Sequence[str]) -> str:
    """On rank 0: wait for every node's report; the message on what is wrong, or nothing."""
    reports: list[NodeReport] = []
    silent: dict[str, list[str]] = {}
    for number, node in enumerate(nodes):
        try:
            # One after another, but they run at the same time: the first wait is the long one.
            store.wait([f"report/{number}"], TIMEOUT if not silent else timedelta(seconds=1))
        except dist.DistError:
            silent[node] = [f"its ranks did not report within {TIMEOUT.seconds} s"]
        else:
            reports.append(NodeReport(**json.loads(store.get(f"report/{number}"))))
    problems = {**compare(reports), **silent}
    return verdict(problems, len(nodes)) if problems else ""


def _all_reduce(store: dist.TCPStore, rank: int, world_size: int, ranks_here: int) -> None:
    """Add up a one of every rank, over the network that training takes."""
    device = torch.device("cuda", rank % ranks_here) if on_gpu() else torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        if float(total) != world_size:
            raise RuntimeError(f"the sum over {world_size} ranks is {float(total)}")
    except (dist.DistError, RuntimeError) as error:
        raise UserError(
            f"an all-reduce over {world_size} ranks by {backend} failed: {error}. The ranks see each other, so look at "
            "the network interface (NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME) and at NCCL_DEBUG=INFO"
        ) from None


def main(arguments: Sequence[str]) -> None:
    """Check, and say so on rank 0."""
    _, loaded = parse_command_line(arguments, "python -m adept_ds.slurm.node_check", __doc__ or "")
    said = check_nodes(loaded.run, os.environ)
    if int(os.environ.get("RANK", "0")) == 0:
        print(said, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_entry_point(main)

"""How much memory each rank of a run needs, and what a step moves, for every place that the frozen weights can live in.

Nothing is loaded: one step is executed on the meta device (`adept_ds.planner.meta_step`) and ZeRO-3's gathers are
followed through it (`adept_ds.planner.zero3_gathers`). A rank's peak is

    weights it keeps + optimizer + whole parameters in flight + what the step has alive at its own peak + runtime

where gathers and the step are taken at their peaks, which lie near each other (between forward and backward pass).
"""

from __future__ import annotations

import copy
import os
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from adept_ds.backbone.load import DTYPES
from adept_ds.config.deepspeed import DEFAULT_STAGE, complete, gathers_layers
from adept_ds.config.run import RunConfig
from adept_ds.data.encode import longest_example, most_labels
from adept_ds.distributed import World, on_main_rank, ranks_by_node
from adept_ds.planner.meta_step import StepShape, StepTrace, meta_model, trace_step
from adept_ds.planner.zero3_gathers import Gathers, GatherSettings, ShardedParameter, simulate_gathers

Sharding = Literal["replicate", "node", "global"]
DeviceType = Literal["cuda", "cpu"]
SHARDINGS: tuple[Sharding, ...] = ("replicate", "node", "global")
"""From the least traffic to the least memory."""

USABLE_SHARE = 0.95
"""Share of the memory that a plan may fill; the allocator loses some to fragments."""
PROCESS_BYTES: dict[DeviceType, int] = {"cuda": 600_000_000, "cpu": 800_000_000}
"""CUDA's context with cuBLAS's workspaces, or a process with the libraries in it; by experience."""
NCCL_BYTES = 500_000_000
"""Buffers of NCCL's communicators on a GPU, by experience."""
USUAL_RANKS_PER_NODE = 8
"""Where more ranks are proposed."""
DEFAULT_REDUCE_BUCKET_SIZE = 500_000_000
"""DeepSpeed's `reduce_bucket_size` in elements, where the section has none."""


@dataclass(frozen=True)
class Cluster:
    """What the run is planned for."""

    nodes: int
    ranks_per_node: int
    memory_bytes: int
    """Of one GPU; without GPUs, of the host for one rank."""
    device_type: DeviceType = "cuda"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def usable_bytes(self) -> int:
        """What a rank may fill of its memory."""
        return int(USABLE_SHARE * self.memory_bytes)

    @classmethod
    def here(cls, world_size: int) -> Cluster:
        """This machine with `world_size` ranks: as many nodes as its GPUs make necessary, or its own memory shared."""
        if torch.cuda.is_available():
            gpus = min(world_size, torch.cuda.device_count())
            return cls(-(-world_size // gpus), gpus, torch.cuda.get_device_properties(0).total_memory)
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(1, world_size, host // world_size, "cpu")


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank has on its device at the peak of a step, by what they are for."""

    backbone: int
    """Its shard of the frozen weights, or all of them; 0 if they are offloaded."""
    adapter: int
    """The trained parameters in the model's precision."""
    optimizer: int
    """fp32 masters, both moments, gradients and the buckets that they are reduced in."""
    gathered: int
    """Whole parameters in flight under ZeRO-3, and small ones that it never splits."""
    activations: int
    """What the backward pass needs, and temporaries."""
    logits: int
    """The loss head's, if it is at work at the peak."""
    dequantized: int
    """Weights of quantised layers in full precision, if one is at work at the peak."""
    runtime: int
    """CUDA's context and NCCL, see `PROCESS_BYTES`; an estimate, where the rest is counted."""

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class ShardingPlan:
    """One place for the frozen weights."""

    sharding: Sharding
    memory: RankMemory
    offloaded: int
    """Bytes of this rank's shards that lie in host memory or on NVMe."""
    gradient_traffic: int
    """Bytes that a step delivers to a rank of gradients and updated parameters."""
    gather_traffic: int
    """Bytes that a step delivers to a rank of whole parameters, its own shard included."""
    fits: bool
    largest_micro_batch: int | None
    """0 if not even one example fits; None if it was not looked for."""


@dataclass(frozen=True)
class MemoryPlan:
    """The prediction for a run on a cluster."""

    cluster: Cluster
    shape: StepShape
    activation_checkpointing: bool
    compiled: bool
    """Whether the run compiles its layers, which the figures do not know of."""
    held_bytes: int
    """Activations saved for the backward pass."""
    logits_bytes: int
    """Most that the loss head has alive at a time."""
    dequantized_bytes: int
    """Most that is alive of quantised weights in full precision at a time."""
    sharding: Sharding
    """Of the run as it is configured."""
    reason: str
    """Why."""
    plans: tuple[ShardingPlan, ...]
    """One for each of `SHARDINGS`."""
    advice: tuple[str, ...]
    """Changes that make it fit, or that save memory for nothing."""

    @property
    def configured(self) -> ShardingPlan:
        """The plan that the run follows."""
        return self.plans[SHARDINGS.index(self.sharding)]


class MemoryModel:
    """Predicts a run's memory; each micro-batch size is executed once.

    Args:
        run: A run whose `deepspeed` section has passed its checks.
        architecture: The backbone's config.
        cluster: Where it is to run.

    Raises:
        UserError: The global batch does not divide over the ranks.
    """

    def __init__(self, run: RunConfig, architecture: PreTrainedConfig, cluster: Cluster) -> None:
        self.run, self.cluster, self.hidden_size = run, cluster, architecture.hidden_size
        self.batch = complete(with_sharding(run, "global"), cluster.world_size, architecture.hidden_size).batch
        self.model = meta_model(run, architecture)
        self.itemsize = DTYPES[run.model.dtype].itemsize
        # The engine keeps fp32 masters of the trained parameters and works with copies in the model's precision.
        self.parameters = [
            ShardedParameter(
                parameter.numel(),
                self.itemsize if parameter.requires_grad else parameter.itemsize,
                parameter.requires_grad,
            )
            for parameter in self.model.parameters()
        ]
        self.trained_numel = sum(parameter.numel for parameter in self.parameters if parameter.is_trained)
        self._traces: dict[int, StepTrace] = {}

    def shape(self, micro_batch_size: int) -> StepShape:
        """The longest batch that the data settings allow, all of it padded to that length; or packed rows, with the
        most labels that the settings allow."""
        model = self.model
        inputs, labels = longest_example(self.run.data, model.num_virtual_tokens, model.is_encoder_decoder)
        if self.batch.packing is not None:
            labels = most_labels(self.batch.packing, model.num_virtual_tokens, labels)
            return StepShape(micro_batch_size, self.batch.packing, labels, is_packed=True)
        return StepShape(micro_batch_size, inputs, labels)

    def trace(self, micro_batch_size: int) -> StepTrace:
        """Execute a step of this size, once."""
        if micro_batch_size not in self._traces:
            shape = self.shape(micro_batch_size)
            self._traces[micro_batch_size] = trace_step(self.model, shape, self.cluster.device_type)
        return self._traces[micro_batch_size]

    def _peak(self, micro_batch_size: int) -> int:
        """Bytes of a step's peak; on a line once three sizes, up to half of this one, have been executed."""
        sizes = sorted(self._traces)
        if micro_batch_size in sizes or len(sizes) < 3 or not sizes[0] < micro_batch_size <= 2 * sizes[-1]:
            return self.trace(micro_batch_size).peak_bytes
        # Peaks are convex in the size: between two sizes the line is never too low.
        index = min(bisect_left(sizes, micro_batch_size), len(sizes) - 1)
        low, high = sizes[index - 1], sizes[index]
        start, end = self._traces[low].peak_bytes, self._traces[high].peak_bytes
        return start + (end - start) * (micro_batch_size - low) // (high - low)

    def plan(self, sharding: Sharding, with_largest: bool = True) -> ShardingPlan:
        """Predict one place for the frozen weights; `with_largest` looks for the largest micro-batch too."""
        cluster, batch = self.cluster, self.batch
        section = complete(with_sharding(self.run, sharding), cluster.world_size, self.hidden_size).config
        zero, is_sharded = section["zero_optimization"], sharding != "replicate"
        trace = self.trace(batch.micro_batch_size)
        weight_ranks = {"replicate": 1, "node": cluster.ranks_per_node, "global": cluster.world_size}[sharding]
        backbone = sum(
            parameter.padded_numel(weight_ranks) // weight_ranks * parameter.itemsize
            for parameter in self.parameters
            if not parameter.is_trained
        )
        adapter = self.trained_numel * self.itemsize // (cluster.world_size if is_sharded else 1)
        optimizer = _optimizer_bytes(self.trained_numel, zero, cluster.world_size, self.run.model.dtype)
        offloaded, gathers = 0, Gathers(0, 0)
        if is_sharded:
            is_offloaded = _is_offloaded(zero, "offload_param")
            by_layer = gathers_layers(self.run, section)
            settings = GatherSettings.of(zero)
            gathers = simulate_gathers(trace, by_layer, self.parameters, weight_ranks, settings, is_offloaded)
            if is_offloaded:
                offloaded, backbone, adapter = backbone + adapter, 0, 0
        if _is_offloaded(zero, "offload_optimizer"):
            offloaded, optimizer = offloaded + optimizer, 0
        has_nccl = cluster.device_type == "cuda" and cluster.world_size > 1
        memory = RankMemory(
            backbone=backbone,
            adapter=adapter,
            optimizer=optimizer,
            gathered=gathers.peak_bytes,
            activations=trace.peak_by_purpose.get("activations", 0),
            logits=trace.peak_by_purpose.get("logits", 0),
            dequantized=trace.peak_by_purpose.get("dequantized", 0),
            runtime=PROCESS_BYTES[cluster.device_type] + (NCCL_BYTES if has_nccl else 0),
        )
        limit = cluster.usable_bytes
        left = limit - (memory.total - trace.peak_bytes)
        return ShardingPlan(
            sharding=sharding,
            memory=memory,
            offloaded=offloaded,
            gradient_traffic=_gradient_traffic(self.trained_numel, zero["stage"], cluster.world_size, self.itemsize),
            gather_traffic=gathers.gathered_bytes * batch.gradient_accumulation_steps,
            fits=memory.total <= limit,
            largest_micro_batch=largest_size(self._peak, left, batch.micro_batch_size) if with_largest else None,
        )

    def on_ranks(self, ranks: int) -> MemoryModel:
        """The same micro-batch and accumulation on more ranks."""
        other = copy.copy(self)
        per_node = min(ranks, max(self.cluster.ranks_per_node, USUAL_RANKS_PER_NODE))
        other.cluster = replace(self.cluster, nodes=-(-ranks // per_node), ranks_per_node=per_node)
        examples = self.batch.micro_batch_size * self.batch.gradient_accumulation_steps * other.cluster.world_size
        train = self.run.train.model_copy(update={"global_batch_size": examples})
        other.run = self.run.model_copy(update={"train": train})
        return other

    def choose(self) -> tuple[Sharding, str]:
        """Return the first of `SHARDINGS` that fits, and why in one line."""
        cluster = self.cluster
        # With one node, sharding within the node is sharding over all ranks; and it is for frozen weights alone.
        has_node = cluster.nodes > 1 and not self.run.method.trains_backbone
        candidates = [sharding for sharding in SHARDINGS if has_node or sharding != "node"]
        sizes = f"the {gigabytes(cluster.memory_bytes)} of a rank"
        too_large: list[str] = []
        for sharding in candidates:
            total = self.plan(sharding, with_largest=False).memory.total
            if total <= cluster.usable_bytes:
                others = f" ({'; '.join(too_large)})" if too_large else ", and it moves the least"
                return sharding, f"{sharding}: needs {gigabytes(total)} of {sizes}{others}"
            too_large.append(f"{sharding} would need {gigabytes(total)}")
        return "global", f"global: nothing fits into {sizes} ({'; '.join(too_large)}), and this needs the least"


def choose_sharding(
    run: RunConfig,
    architecture: PreTrainedConfig,
    world_size: int,
    ranks_per_node: int,
    memory_bytes: int,
    device_type: DeviceType = "cuda",
) -> tuple[Sharding, str]:
    """Return the place for the frozen weights with the least traffic that fits, and why in one line.

    Args:
        run: The run; what it says of its sharding does not matter.
        architecture: The backbone's config.
        world_size: Number of ranks.
        ranks_per_node: Ranks on each node.
        memory_bytes: Memory of one rank's device.
        device_type: Kind of device.

    Raises:
        UserError: The global batch does not divide over the ranks.
    """
    cluster = Cluster(world_size // ranks_per_node, ranks_per_node, memory_bytes, device_type)
    return MemoryModel(run, architecture, cluster).choose()


def decide_sharding(run: RunConfig, architecture: PreTrainedConfig, world: World) -> RunConfig:
    """Return the run with `train.sharding: auto` replaced by what `choose_sharding` says on rank 0. Collective.

    Raises:
        UserError: The global batch does not divide over the ranks, or the nodes have different numbers of them.
    """
    if run.train.sharding != "auto":
        return run
    nodes = ranks_by_node(world)
    memory = Cluster.here(len(nodes[0])).memory_bytes
    device_type: DeviceType = "cuda" if world.device.type == "cuda" else "cpu"

    def choose() -> Sharding:
        sharding, reason = choose_sharding(run, architecture, world.world_size, len(nodes[0]), memory, device_type)
        print(f"train.sharding auto is {reason}")
        return sharding

    return with_sharding(run, on_main_rank(choose, world))


def configured_sharding(run: RunConfig) -> Sharding | None:
    """Where the run's settings put the frozen weights; None if that is to be chosen."""
    if run.train.sharding == "auto":
        return None
    if run.train.sharding is not None:
        return run.train.sharding
    stage = run.deepspeed.get("zero_optimization", {}).get("stage", DEFAULT_STAGE)
    return "global" if stage == 3 else "replicate"


def with_sharding(run: RunConfig, sharding: Sharding) -> RunConfig:
    """The run with its frozen weights elsewhere; a ZeRO stage that goes with the new place is kept."""
    zero = dict(run.deepspeed.get("zero_optimization", {}))
    if sharding != "replicate":
        zero["stage"] = 3
    elif zero.get("stage", DEFAULT_STAGE) == 3:
        zero["stage"] = DEFAULT_STAGE
    train = run.train.model_copy(update={"sharding": sharding})
    return run.model_copy(update={"train": train, "deepspeed": {**run.deepspeed, "zero_optimization": zero}})


def largest_size(bytes_of: Callable[[int], int], limit: int, start: int) -> int:
    """Return the largest size >= 1 with `bytes_of(size) <= limit`, or 0. Made for functions that are nearly linear.

    Each guess is where the line through the last two sizes reaches the limit; when a guess confirms the line, it is
    the answer.
    """
    fitting, failing = 0, None
    size, last = start, None
    while failing is None or failing - fitting > 1:
        measured = bytes_of(size)
        if measured <= limit:
            fitting = max(fitting, size)
        else:
            failing = min(failing or size, size)
        if last is None:
            guess = 2 * size if measured <= limit else size // 2
        else:
            slope = max(1, (measured - last[1]) // (size - last[0]))
            guess = size + (limit - measured) // slope
            if guess == size:
                break
        last = (size, measured)
        size = max(guess, fitting + 1)
        if failing is not None:
            size = min(size, failing - 1)
    return fitting


def gigabytes(count: int) -> str:
    """Bytes as text, in units of 1,000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if unit == "GB" else f"{count / size:.0f} {unit}"
    return f"{count} B"


def _is_offloaded(zero: Mapping[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


def _optimizer_bytes(numel: int, zero: Mapping[str, Any], world_size: int, dtype: str) -> int:
    """Masters, moments, gradients and reduction buckets of AdamW over `numel` parameters, as DeepSpeed holds them."""
    stage = zero["stage"]
    if stage == 0:
        return (8 + 4) * numel  # the fp32 parameters are their own masters
    states = (4 + 8) * numel // world_size
    if stage == 3:
        # Each rank's part of the gradients, once accumulated and once handed to the optimizer.
        return states + 2 * 4 * numel // world_size + _bucket_bytes(zero, 4, copies=1)
    itemsize = DTYPES[dtype].itemsize
    copies = 2 if zero.get("overlap_comm") else 1
    if stage == 2:
        return states + itemsize * numel + 4 * numel // world_size + _bucket_bytes(zero, itemsize, copies)
    # bf16 has an optimizer of its own at stage 1, which reduces its flat fp32 gradients in place.
    bucket = 0 if dtype == "bf16" else _bucket_bytes(zero, 4, copies)
    return states + (itemsize + 4) * numel + bucket


def _bucket_bytes(zero: Mapping[str, Any], itemsize: int, copies: int) -> int:
    """Buffers of `reduce_bucket_size` elements, which are allocated in full however few gradients there are."""
    if not zero.get("contiguous_gradients", True):
        return 0
    return int(zero.get("reduce_bucket_size", DEFAULT_REDUCE_BUCKET_SIZE)) * itemsize * copies


def _gradient_traffic(numel: int, stage: int, world_size: int, itemsize: int) -> int:
    """fp32 gradients, and at the stages 1 and 2 the updated parameters."""
    if world_size == 1:
        return 0
    return 4 * numel + (itemsize * numel if stage in (1, 2) else 0)

"""The planner's prediction for a whole run: all places for the weights side by side, what to change, and the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from transformers import PreTrainedConfig

from adept_ds.config import RunConfig
from adept_ds.memory_plan import (
    SHARDINGS,
    USABLE_SHARE,
    Cluster,
    MemoryModel,
    MemoryPlan,
    RankMemory,
    ShardingPlan,
    configured_sharding,
    gigabytes,
    with_sharding,
)

_MOST_RANKS = 4096
"""More are not proposed."""
_SMALL_BUCKET = 1_000_000
"""Elements of a gradient bucket that is large enough for the methods here."""


def plan_memory(run: RunConfig, architecture: PreTrainedConfig, cluster: Cluster) -> MemoryPlan:
    """Predict `run` on `cluster` for every place that its frozen weights can live in.

    Raises:
        UserError: The global batch does not divide over the ranks.
    """
    model = MemoryModel(run, architecture, cluster)
    plans = tuple(model.plan(sharding) for sharding in SHARDINGS)
    sharding, reason = configured_sharding(run), "as configured"
    if sharding is None:
        sharding, reason = model.choose()
    trace = model.trace(model.batch.micro_batch_size)
    configured = plans[SHARDINGS.index(sharding)]
    return MemoryPlan(
        cluster=cluster,
        shape=model.shape(model.batch.micro_batch_size),
        activation_checkpointing=run.train.activation_checkpointing,
        held_bytes=trace.held_bytes,
        logits_bytes=trace.logits_bytes,
        dequantized_bytes=trace.dequantized_bytes,
        sharding=sharding,
        reason=reason,
        plans=plans,
        advice=tuple(_advice(model, architecture, configured, plans)),
    )


def memory_json(plan: MemoryPlan) -> dict[str, Any]:
    """The plan as plain values: bytes, and totals beside their parts."""
    values = asdict(plan)
    for entry, sharding_plan in zip(values["plans"], plan.plans, strict=True):
        entry["memory"]["total"] = sharding_plan.memory.total
    return values


def memory_text(plan: MemoryPlan) -> str:
    """The plan as a table of all places, the configured one marked, and the advice."""
    cluster, shape = plan.cluster, plan.shape
    device = "GPU" if cluster.device_type == "cuda" else "CPU rank"
    head = [
        f"memory         of one {device} at the peak of a step, predicted; {cluster.nodes} x {cluster.ranks_per_node} "
        f"ranks (nodes x ranks of each), {USABLE_SHARE:.0%} of {gigabytes(cluster.memory_bytes)} for each",
        f"batch          {shape.micro_batch_size} x {shape.input_length} tokens ({shape.label_length} labels each), "
        f"activation checkpointing {'on' if plan.activation_checkpointing else 'off'}",
    ]
    marked = [f"{entry.sharding}{' *' if entry.sharding == plan.sharding else ''}" for entry in plan.plans]
    rows = [("", *marked)]
    for field in fields(RankMemory):
        rows.append((_LABELS[field.name], *(gigabytes(getattr(entry.memory, field.name)) for entry in plan.plans)))
    rows.append(("total", *(gigabytes(entry.memory.total) for entry in plan.plans)))
    if any(entry.offloaded for entry in plan.plans):
        rows.append(("offloaded", *(gigabytes(entry.offloaded) for entry in plan.plans)))
    rows += [
        ("fits", *("yes" if entry.fits else "NO" for entry in plan.plans)),
        ("largest micro-batch", *(str(entry.largest_micro_batch or "none") for entry in plan.plans)),
        ("traffic in the node", *(gigabytes(_traffic(entry, cluster)[0]) for entry in plan.plans)),
        ("  between nodes", *(gigabytes(_traffic(entry, cluster)[1]) for entry in plan.plans)),
    ]
    table = [f"  {label:<34}" + "".join(f"{cell:>14}" for cell in cells) for label, *cells in rows]
    alive = [f"the loss head's logits {gigabytes(plan.logits_bytes)} at a time"]
    if plan.dequantized_bytes:
        alive.append(f"dequantised weights {gigabytes(plan.dequantized_bytes)} at a time")
    notes = [
        f"  * {plan.sharding}, {plan.reason}",
        f"  Saved for the backward pass: {gigabytes(plan.held_bytes)}; {', '.join(alive)}.",
        "  Traffic: what the collectives of one step deliver to a rank.",
    ]
    verdict = "fits" if plan.configured.fits else "DOES NOT FIT"
    notes.append(f"  {plan.sharding} {verdict}" + (":" if plan.advice else "."))
    return "\n".join([*head, *table, *notes, *(f"    - {line}" for line in plan.advice)])


_LABELS = {
    "backbone": "frozen weights",
    "adapter": "trained parameters",
    "optimizer": "optimizer, gradients, buckets",
    "gathered": "gathered weights in flight",
    "activations": "activations and temporaries",
    "logits": "logits at that moment",
    "dequantized": "dequantised weight at that moment",
    "runtime": "runtime (estimate)",
}


def _traffic(plan: ShardingPlan, cluster: Cluster) -> tuple[int, int]:
    """Bytes within the node and over the network. What a collective over several nodes delivers crosses the network."""
    gathers_cross = cluster.nodes > 1 and plan.sharding == "global"
    between = (plan.gradient_traffic if cluster.nodes > 1 else 0) + (plan.gather_traffic if gathers_cross else 0)
    return plan.gradient_traffic + plan.gather_traffic - between, between


def _advice(
    model: MemoryModel, architecture: PreTrainedConfig, configured: ShardingPlan, plans: tuple[ShardingPlan, ...]
) -> Iterator[str]:
    """What to change, each with what it leads to."""
    run, cluster = model.run, model.cluster
    zero = run.deepspeed.get("zero_optimization", {})
    if configured.memory.optimizer > 100 * 4 * model.trained_numel + 4 * _SMALL_BUCKET:
        yield (
            f"deepspeed.zero_optimization.reduce_bucket_size {_SMALL_BUCKET}: the buckets take "
            f"{gigabytes(configured.memory.optimizer)} for gradients of {gigabytes(4 * model.trained_numel)}"
        )
    if configured.fits:
        return
    for plan in plans:
        if plan.fits and (plan.sharding != "node" or cluster.nodes > 1):
            yield f"train.sharding {plan.sharding}: {gigabytes(plan.memory.total)}, fits"
    if configured.largest_micro_batch:
        examples = model.batch.micro_batch_size * model.batch.gradient_accumulation_steps
        size = max(n for n in range(1, configured.largest_micro_batch + 1) if examples % n == 0)
        yield f"train.micro_batch_size {size}, with {examples // size} accumulation steps: fits"
    changes: list[tuple[str, RunConfig]] = []
    if not run.train.activation_checkpointing:
        train = run.train.model_copy(update={"activation_checkpointing": True})
        changes.append(("train.activation_checkpointing true", run.model_copy(update={"train": train})))
    if run.model.quantization != "nf4":
        quantized = run.model.model_copy(update={"quantization": "nf4"})
        changes.append(("model.quantization nf4", run.model_copy(update={"model": quantized})))
    if not zero.get("offload_param"):
        section = {**run.deepspeed, "zero_optimization": {**zero, "offload_param": {"device": "cpu"}}}
        changes.append(
            (
                "deepspeed.zero_optimization.offload_param.device cpu, with train.sharding global",
                with_sharding(run.model_copy(update={"deepspeed": section}), "global"),
            )
        )
    for text, changed in changes:
        plan = MemoryModel(changed, architecture, cluster).plan(configured_sharding(changed) or "global", False)
        yield f"{text}: {gigabytes(plan.memory.total)}{', fits' if plan.fits else ', not enough alone'}"
    ranks = cluster.world_size * 2
    while ranks <= _MOST_RANKS:
        plan = model.on_ranks(ranks).plan("global", with_largest=False)
        if plan.fits:
            yield f"{ranks} ranks with train.sharding global and this micro-batch: {gigabytes(plan.memory.total)}, fits"
            return
        ranks *= 2

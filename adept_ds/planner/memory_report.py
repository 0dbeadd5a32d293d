"""The planner's prediction as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from adept_ds.planner.memory import (
    USABLE_SHARE,
    Cluster,
    MemoryPlan,
    RankMemory,
    ShardingPlan,
    gigabytes,
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
        f"batch          {shape.micro_batch_size} {'packed row(s) of' if shape.is_packed else 'x'} "
        f"{shape.input_length} tokens ({shape.label_length} labels each), "
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
        "  Traffic: what the collectives of one step deliver to a rank"
        + (", if no two of its examples share a row." if shape.is_packed else "."),
    ]
    if plan.compiled:
        notes.append("  train.compile: the figures are those without it; what it saves or takes is not counted.")
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

"""The prediction for a whole run: all places that the weights can live in side by side, and what to change."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedConfig

from adept_ds.config.run import RunConfig
from adept_ds.planner.memory import (
    SHARDINGS,
    Cluster,
    MemoryModel,
    MemoryPlan,
    ShardingPlan,
    configured_sharding,
    gigabytes,
    with_sharding,
)
from adept_ds.planner.packing import check_packing

_MOST_RANKS = 4096
"""More are not proposed."""
_SMALL_BUCKET = 1_000_000
"""Elements of a gradient bucket that is large enough for the methods here."""


def plan_memory(run: RunConfig, architecture: PreTrainedConfig, cluster: Cluster) -> MemoryPlan:
    """Predict `run` on `cluster` for every place that its frozen weights can live in.

    Raises:
        UserError: The global batch does not divide over the ranks; or as `check_packing`.
    """
    check_packing(run, architecture)
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
        compiled=run.train.compile,
        held_bytes=trace.held_bytes,
        logits_bytes=trace.logits_bytes,
        dequantized_bytes=trace.dequantized_bytes,
        sharding=sharding,
        reason=reason,
        plans=plans,
        advice=tuple(_advice(model, architecture, configured, plans)),
    )


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
    if configured.largest_micro_batch and model.batch.packing is not None:
        yield f"train.micro_batch_size {configured.largest_micro_batch}, in rows: fits"
    elif configured.largest_micro_batch:
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

"""The planner: parts of a rank's memory, choice of a sharding, largest micro-batch, advice, launcher."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import LlamaConfig, T5Config

from adept_ds.config.run import RunConfig
from adept_ds.planner.memory import (
    NCCL_BYTES,
    PROCESS_BYTES,
    USABLE_SHARE,
    Cluster,
    MemoryModel,
    choose_sharding,
    largest_size,
    with_sharding,
)
from adept_ds.planner.memory_plan import plan_memory
from adept_ds.planner.memory_report import memory_text
from adept_ds.planner.meta_step import meta_model

LLAMA = LlamaConfig(
    vocab_size=1_000,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GIB = 2**30
RUNTIME = PROCESS_BYTES["cuda"] + NCCL_BYTES


def run_of(stage: int = 3, **sections: Any) -> RunConfig:
    zero = {"stage": stage, "reduce_bucket_size": 1_000, "stage3_param_persistence_threshold": 0}
    values = {
        "model": {"name_or_path": "random", "dtype": "bf16"},
        "data": {"max_prompt_length": 80, "max_length": 120},
        "train": {"max_steps": 9, "warmup_steps": 0, "global_batch_size": 32},
        "deepspeed": {"zero_optimization": zero},
    }
    for name, changes in sections.items():
        values[name] = {**values[name], **changes}
    return RunConfig.model_validate(values)


def model_of(run: RunConfig, nodes: int = 2, ranks: int = 4, memory: int = GIB * 4) -> MemoryModel:
    return MemoryModel(run, LLAMA, Cluster(nodes, ranks, memory))


def frozen_bytes(run: RunConfig) -> int:
    frozen = (parameter for parameter in meta_model(run, LLAMA).parameters() if not parameter.requires_grad)
    return sum(parameter.numel() * parameter.itemsize for parameter in frozen)


def test_each_sharding_divides_the_frozen_weights_by_its_ranks():
    run = run_of()
    shards = {name: model_of(run).plan(name).memory.backbone for name in ("replicate", "node", "global")}
    whole = frozen_bytes(run)
    assert shards["replicate"] == whole
    assert shards["node"] == pytest.approx(whole / 4, rel=0.01)
    assert shards["global"] == pytest.approx(whole / 8, rel=0.01)


def test_nf4_is_counted_by_its_storage():
    plain, nf4 = (model_of(run_of(model={"quantization": kind})) for kind in (None, "nf4"))
    table = 2 * 1_000 * 64 * 2
    assert nf4.plan("replicate").memory.backbone - table < 0.3 * (plain.plan("replicate").memory.backbone - table)


def test_tied_weights_count_once():
    tied = LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
    sizes = [MemoryModel(run_of(), shape, Cluster(1, 2, GIB)).plan("replicate").memory for shape in (LLAMA, tied)]
    assert sizes[0].backbone - sizes[1].backbone == 1_000 * 64 * 2


def test_gradients_alone_travel_where_weights_are_whole():
    model = model_of(run_of(stage=1))
    plan = model.plan("replicate")
    assert plan.gather_traffic == 0
    assert plan.gradient_traffic == 4 * model.trained_numel + 2 * model.trained_numel


def test_every_accumulation_step_gathers_anew():
    once, twice = (
        model_of(run_of(train={"micro_batch_size": 4, "global_batch_size": size})).plan("global") for size in (32, 64)
    )
    assert twice.gather_traffic == 2 * once.gather_traffic > 0


def test_checkpointing_gathers_more_and_keeps_less():
    settings = {"stage3_max_live_parameters": 20_000, "stage3_max_reuse_distance": 0}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, **settings}
    plain, checkpointed, by_layer = (
        model_of(run_of(train=train, deepspeed={"zero_optimization": zero})).plan("global")
        for train in (
            {"gather": "weight"},
            {"gather": "weight", "activation_checkpointing": True},
            {"gather": "layer", "activation_checkpointing": True},
        )
    )
    assert checkpointed.gather_traffic > plain.gather_traffic >= by_layer.gather_traffic
    assert checkpointed.memory.activations < 0.5 * plain.memory.activations


def test_two_layers_are_whole_at_a_time():
    run = run_of(deepspeed={"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    shapes = [LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": count}) for count in (3, 4)]
    plans = [MemoryModel(run, shape, Cluster(1, 2, GIB)).plan("global") for shape in shapes]
    assert plans[0].memory.gathered == plans[1].memory.gathered
    # Of one layer more: once forward and once backward.
    weights, norms = 2 * 64 * (64 + 32) + 3 * 64 * 160, 2 * 64
    assert plans[1].gather_traffic - plans[0].gather_traffic == 2 * 2 * (weights + norms)


def test_offloaded_weights_leave_the_device():
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": 0}
    plan = model_of(run_of(deepspeed={"zero_optimization": zero})).plan("global")
    assert plan.memory.backbone == 0
    assert plan.offloaded >= frozen_bytes(run_of()) // 8
    assert plan.memory.gathered > 0


def test_reduction_buckets_are_allocated_in_full():
    small, large = (
        model_of(run_of(deepspeed={"zero_optimization": {"stage": 3, "reduce_bucket_size": size}})).plan("global")
        for size in (1_000, 501_000)
    )
    assert large.memory.optimizer - small.memory.optimizer == 4 * 500_000


def memory_between(run: RunConfig, fits: str, fails: str) -> int:
    """Memory of a GPU in which one sharding fits and another does not."""
    totals = [model_of(run).plan(name).memory.total for name in (fits, fails)]
    assert totals[0] < totals[1]
    return int(sum(totals) / 2 / USABLE_SHARE)


@pytest.fixture
def large_run() -> RunConfig:
    """Weights that outweigh what is in flight when they are sharded."""
    zero = {"stage": 3, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "reduce_bucket_size": 1_000}
    return run_of(
        deepspeed={
            "zero_optimization": {**zero, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
        }
    )


@pytest.mark.parametrize(("chosen", "too_large"), [("node", "replicate"), ("global", "node")])
def test_auto_takes_the_least_traffic_that_fits(large_run, chosen, too_large):
    memory = memory_between(large_run, chosen, too_large)
    sharding, reason = choose_sharding(large_run, LLAMA, world_size=8, ranks_per_node=4, memory_bytes=memory)
    assert sharding == chosen
    assert f"{too_large} would need" in reason
    assert "\n" not in reason


def test_auto_replicates_where_there_is_room(large_run):
    assert choose_sharding(large_run, LLAMA, 8, 4, 80 * GIB)[0] == "replicate"


def test_auto_says_when_nothing_fits(large_run):
    sharding, reason = choose_sharding(large_run, LLAMA, 8, 4, RUNTIME)
    assert sharding == "global"
    assert "nothing fits" in reason


def test_the_largest_micro_batch_is_the_largest():
    run = run_of(train={"micro_batch_size": 2})
    memory = int((RUNTIME + 60_000_000) / USABLE_SHARE)
    model = model_of(run, memory=memory)
    size = model.plan("replicate").largest_micro_batch
    assert size is not None
    assert size > 4
    for micro_batch, fits in ((size, True), (size + 1, False)):
        examples = {"micro_batch_size": micro_batch, "global_batch_size": 8 * micro_batch}
        assert model_of(run_of(train=examples), memory=memory).plan("replicate", False).fits == fits


@pytest.mark.parametrize(("limit", "size"), [(99, 0), (110, 1), (1_000, 90), (1_009, 90), (123_456, 12_335)])
def test_largest_size_of_a_line(limit, size):
    assert largest_size(lambda n: 100 + 10 * n, limit, start=4) == size


def test_a_run_that_fits_needs_no_advice():
    assert plan_memory(run_of(), LLAMA, Cluster(1, 4, 80 * GIB)).advice == ()


def test_advice_makes_the_run_fit():
    run = run_of(stage=1, train={"global_batch_size": 128})
    total = model_of(run, 1, 4).plan("replicate").memory.total
    plan = plan_memory(run, LLAMA, Cluster(1, 4, int((total - 5_000_000) / USABLE_SHARE)))
    assert not plan.configured.fits
    assert any("train.activation_checkpointing true" in line and "fits" in line for line in plan.advice)
    (batch,) = [line for line in plan.advice if "train.micro_batch_size" in line]
    size, steps = int(batch.split()[1].strip(",")), int(batch.split()[3])
    assert size * steps == 32
    smaller = run_of(stage=1, train={"global_batch_size": 128, "micro_batch_size": size})
    assert model_of(smaller, 1, 4, plan.cluster.memory_bytes).plan("replicate").fits


def test_buckets_for_nothing_are_pointed_out():
    run = run_of(deepspeed={"zero_optimization": {"stage": 3, "reduce_bucket_size": 500_000_000}})
    assert "reduce_bucket_size" in plan_memory(run, LLAMA, Cluster(1, 4, 80 * GIB)).advice[0]


def test_the_text_marks_the_configured_sharding():
    text = memory_text(plan_memory(with_sharding(run_of(), "node"), LLAMA, Cluster(2, 4, GIB * 4)))
    assert "node *" in text
    assert "global *" not in text


LAUNCHER = ("launchers/plan.py", None, "--config", "ds_configs/smollm2_135m.json")


def test_the_launcher_writes_the_parts_of_every_total(run_ranks, tmp_path):
    out = tmp_path / "plan.json"
    result = run_ranks(0, *LAUNCHER, "--gpus", "2", "--gpu-memory", "16GB", "--json", str(out), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert "largest micro-batch" in result.stdout
    plans = json.loads(out.read_text())["plans"]
    assert [plan["sharding"] for plan in plans] == ["replicate", "node", "global"]
    for plan in plans:
        total = plan["memory"].pop("total")
        assert total == sum(plan["memory"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "2"), "--gpus 2 without --gpu-memory"),
        (("--gpus", "2", "--gpu-memory", "lots"), "expected a size such as 80GB"),
        (("--gpus", "3", "--gpu-memory", "80GB"), "the global batch must divide by the world size"),
    ],
)
def test_the_launcher_refuses_what_it_cannot_plan(run_ranks, arguments, message):
    result = run_ranks(0, *LAUNCHER, *arguments, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_tasks_are_planned_at_their_own_lengths():
    t5 = T5Config(vocab_size=1_000, d_model=64, d_kv=16, d_ff=160, num_layers=2, num_heads=4, decoder_start_token_id=0)
    run = run_of(data={"format": "tasks", "tasks": ["rte", "multirc"], "max_prompt_length": 325, "max_length": 581})
    shape = MemoryModel(run, t5, Cluster(1, 1, GIB)).shape(2)
    assert (shape.input_length, shape.label_length) == (7 + 348, 20)
    causal = MemoryModel(run, LLAMA, Cluster(1, 1, GIB)).shape(2)
    assert (causal.input_length, causal.label_length) == (7 + 348 + 20, 20)

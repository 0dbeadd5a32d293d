"""The `deepspeed` section: batch arithmetic, checks, and what is filled in."""

from __future__ import annotations

from typing import Any

import pytest

from adept_ds.config.deepspeed import (
    BatchArithmetic,
    batch_arithmetic,
    complete,
    contradictions,
    section_problems,
)
from adept_ds.config.run import RunConfig, TrainConfig
from adept_ds.errors import UserError


def make_run(deepspeed: dict[str, Any] | None = None, dtype: str = "bf16", **train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name_or_path": "x", "dtype": dtype},
            "train": {"max_steps": 1000, "global_batch_size": 32} | train,
            "deepspeed": {"zero_optimization": {"stage": 3}} if deepspeed is None else deepspeed,
        }
    )


def split(world_size: int, **train: Any) -> BatchArithmetic:
    return batch_arithmetic(
        TrainConfig.model_validate({"max_steps": 1000, "global_batch_size": 32} | train), world_size
    )


@pytest.mark.parametrize(
    ("world_size", "train", "micro", "accumulation"),
    [
        (1, {}, 32, 1),
        (4, {}, 8, 1),
        (4, {"micro_batch_size": 2}, 2, 4),
        (4, {"gradient_accumulation_steps": 2}, 4, 2),
        (2, {"micro_batch_size": 8, "gradient_accumulation_steps": 2}, 8, 2),
        (32, {}, 1, 1),
    ],
)
def test_batch_arithmetic(world_size, train, micro, accumulation):
    assert split(world_size, **train) == BatchArithmetic(32, micro, accumulation, world_size)


@pytest.mark.parametrize(
    ("world_size", "train", "expected"),
    [
        (3, {}, "global_batch_size 30 or 33, or a world size among 1, 2, 4, 8, 16, 32"),
        (64, {}, "global_batch_size 64, or a world size"),
        (
            4,
            {"micro_batch_size": 3},
            "micro_batch_size must divide the 8 examples of one rank; expected one of 1, 2, 4, 8",
        ),
        (4, {"gradient_accumulation_steps": 16}, "gradient_accumulation_steps must divide the 8 examples"),
        (4, {"micro_batch_size": 2, "gradient_accumulation_steps": 2}, "x world size is 16"),
    ],
)
def test_a_batch_that_does_not_divide_names_the_keys_and_what_would(world_size, train, expected):
    with pytest.raises(UserError) as caught:
        split(world_size, **train)
    message = str(caught.value)
    assert expected in message
    assert "train.global_batch_size = 32" in message
    assert f"world size = {world_size}" in message


def test_completed_section_states_every_value_that_matters():
    config = complete(make_run(max_grad_norm=0.5), 4).config
    assert config["train_batch_size"] == 32
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_accumulation_steps"] == 1
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"] is True
    assert config["fp16"]["enabled"] is False
    assert config["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 1_000_000}
    assert config["zero_allow_untested_optimizer"] is True
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


def test_no_clipping_is_written_out():
    assert complete(make_run(), 1).config["gradient_clipping"] == 0.0


def test_fp32_turns_bf16_off():
    assert complete(make_run(dtype="fp32"), 1).config["bf16"]["enabled"] is False


def test_derived_values_name_their_owner():
    derived = complete(make_run(), 1).derived
    assert derived["train_batch_size"] == "train.global_batch_size"
    assert derived["bf16.enabled"] == "model.dtype"


def test_auto_and_equal_values_are_accepted():
    section = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
    }
    run = make_run(section, gradient_accumulation_steps=2)
    assert complete(run, 2).config["train_micro_batch_size_per_gpu"] == 8


def test_the_users_own_values_stay():
    section = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}, "communication_data_type": "bf16"}
    config = complete(make_run(section), 1).config
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7}
    assert config["communication_data_type"] == "bf16"


def test_the_run_is_left_as_it_was():
    run = make_run({"bf16": {"enabled": "auto"}})
    complete(run, 1)
    assert run.deepspeed == {"bf16": {"enabled": "auto"}}


@pytest.mark.parametrize(
    ("section", "key", "owner"),
    [
        ({"train_batch_size": 16}, "deepspeed.train_batch_size", "train.global_batch_size = 32"),
        ({"gradient_clipping": 1.0}, "deepspeed.gradient_clipping", "train.max_grad_norm = 0.0"),
        ({"bf16": {"enabled": False}}, "deepspeed.bf16.enabled", "model.dtype = 'bf16'"),
        ({"bf16": {"enabled": 1}}, "deepspeed.bf16.enabled", "model.dtype = 'bf16'"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16.enabled", "model.dtype = 'bf16'"),
        ({"torch_autocast": {"enabled": True}}, "deepspeed.torch_autocast.enabled", "model.dtype = 'bf16'"),
    ],
)
def test_a_contradiction_names_both_keys_and_values(section, key, owner):
    [(named, message)] = contradictions(make_run(section))
    assert named == key
    assert owner in message


def test_a_contradiction_that_depends_on_the_world_size():
    run = make_run({"train_micro_batch_size_per_gpu": 8})
    assert complete(run, 4).batch.micro_batch_size == 8
    with pytest.raises(UserError, match=r"per_gpu: 8 contradicts train\.micro_batch_size"):
        complete(run, 2)


@pytest.mark.parametrize(
    ("section", "key", "expected"),
    [
        ({"zero_optimisation": {}}, "deepspeed.zero_optimisation", "did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stag": 3}}, "deepspeed.zero_optimization.stag", "did you mean 'stage'?"),
        ({"zero_optimization": {"stage": "3"}}, "deepspeed.zero_optimization.stage", "expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "deepspeed.zero_optimization.stage", "expected 0, 1, 2 or 3"),
        ({"zero_optimization": True}, "deepspeed.zero_optimization", "expected an object"),
        ({"zero_optimization": {"overlap_comm": "auto"}}, "deepspeed.zero_optimization.overlap_comm", "fills in"),
        ({"steps_per_print": "auto"}, "deepspeed.steps_per_print", "fills in"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "deepspeed.data_types.grad_acum_dtype", "'grad_accum_dtype'?"),
        ({"optimizer": {}}, "deepspeed.optimizer", "train.learning_rate"),
        ({"scheduler": {}}, "deepspeed.scheduler", "train.warmup_steps"),
        ({"gradient_allreduce_op": "sum"}, "deepspeed.gradient_allreduce_op", "averaged"),
    ],
)
def test_what_deepspeed_would_take_silently_is_refused(section, key, expected):
    [(named, message)] = section_problems(section)
    assert named == key
    assert expected in message


def test_auto_sizes_follow_from_the_hidden_size():
    keys = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    run = make_run({"zero_optimization": {"stage": 3} | dict.fromkeys(keys, "auto")})
    zero = complete(run, 1, hidden_size=100).config["zero_optimization"]
    assert [zero[key] for key in keys] == [10_000, 9_000, 1_000]


def test_auto_sizes_without_a_hidden_size_are_refused():
    run = make_run({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}})
    with pytest.raises(UserError, match=r"deepspeed\.zero_optimization\.reduce_bucket_size"):
        complete(run, 1)


@pytest.fixture
def deepspeed_config_module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return pytest.importorskip("deepspeed.runtime.config")


def test_stage_0_in_bf16_is_refused_for_it_keeps_nothing_to_save():
    section = {"zero_optimization": {"stage": 0}}
    with pytest.raises(UserError, match=r"zero_optimization\.stage: stage 0 with model\.dtype bf16"):
        complete(make_run(section), 1)
    assert complete(make_run(section, dtype="fp32"), 1).config["zero_optimization"]["stage"] == 0


@pytest.mark.parametrize("section", [{"steps_per_print": 7}, {"zero_optimization": {"overlap_comm": True}}])
def test_without_a_stage_it_is_1(section):
    assert complete(make_run(section), 1).config["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_deepspeed_reads_the_completed_section_as_meant(deepspeed_config_module, stage, dtype):
    section = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    config = deepspeed_config_module.DeepSpeedConfig(complete(make_run(section, dtype=dtype), 1).config)
    assert config.zero_optimization_stage == stage
    assert config.zero_config.param_persistence_threshold == 0
    assert config.gradient_clipping == 0.0
    assert config.bfloat16_config.enabled == (dtype == "bf16")
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (32, 32)


@pytest.mark.parametrize(
    ("offload", "key", "message"),
    [
        ({"device": "nvem"}, "device", "did you mean 'nvme'"),
        ({"device": "nvme", "nvme_path": "/no/such/disk"}, "nvme_path", "folder of a local disk"),
        ({"devcie": "cpu"}, "devcie", "did you mean 'device'"),
    ],
)
def test_offload_settings_are_checked(offload, key, message):
    problems = dict(section_problems({"zero_optimization": {"stage": 3, "offload_param": offload}}))
    assert message in problems[f"deepspeed.zero_optimization.offload_param.{key}"]


def test_only_split_weights_are_offloaded():
    with pytest.raises(UserError, match="only weights that are split can be offloaded"):
        complete(make_run({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}), 1)


def test_a_disk_is_read_when_a_weight_is_needed_unless_the_section_says_otherwise(tmp_path):
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}
    completed = complete(make_run({"zero_optimization": zero}), 1).config["zero_optimization"]
    assert (completed["stage3_max_reuse_distance"], completed["stage3_prefetch_bucket_size"]) == (0, 0)
    completed = complete(make_run({"zero_optimization": zero | {"stage3_max_reuse_distance": 9}}), 1).config
    assert completed["zero_optimization"]["stage3_max_reuse_distance"] == 9


@pytest.mark.parametrize(("sharding", "stage"), [("node", 3), ("global", 3), ("replicate", 1)])
def test_sharding_sets_the_stage(sharding, stage):
    assert complete(make_run({}, sharding=sharding), 1).config["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(("sharding", "stage"), [("node", 2), ("global", 1), ("replicate", 3), ("auto", 3)])
def test_a_stage_that_contradicts_the_sharding_names_both(sharding, stage):
    with pytest.raises(UserError, match=r"zero_optimization\.stage: .*train\.sharding"):
        complete(make_run({"zero_optimization": {"stage": stage}}, sharding=sharding), 1)


def test_stage_2_may_replicate():
    run = make_run({"zero_optimization": {"stage": 2}}, sharding="replicate")
    assert complete(run, 1).config["zero_optimization"]["stage"] == 2

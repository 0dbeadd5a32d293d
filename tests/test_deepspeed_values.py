"""Values of the `deepspeed` section that are wrong are told by their keys before anything is loaded."""

from __future__ import annotations

import json
from typing import Any

import pytest

from adept_ds.config.deepspeed import complete
from adept_ds.config.loader import load_values
from adept_ds.config.run import RunConfig
from adept_ds.errors import UserError
from adept_ds.planner.deepspeed_values import check_deepspeed_values

WRONG: dict[str, list[dict[str, Any]]] = {
    "steps_per_print": [{"steps_per_print": value} for value in ("a", 0, -1, True)],
    "zero_optimization.reduce_bucket_size": [
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": value}} for value in ("big", -5, 1.5)
    ],
    "zero_optimization.overlap_comm": [{"zero_optimization": {"overlap_comm": "maybe"}}],
    "zero_optimization.offload_param": [{"zero_optimization": {"stage": 3, "offload_param": "cpu"}}],
    "zero_optimization.offload_param.device": [{"zero_optimization": {"stage": 3, "offload_param": {"device": []}}}],
    "zero_optimization.offload_param.pin_memory": [
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": "x"}}}
    ],
    "zero_optimization.offload_optimizer.ratio": [
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 7}}}
    ],
    "zero_optimization.stage3_max_live_parameters": [
        {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1.5}}
    ],
    "zero_optimization.leaf_module": [{"zero_optimization": {"stage": 3, "leaf_module": 5}}],
    "zero_optimization.zenflow": [{"zero_optimization": {"stage": 3, "zenflow": 5}}],
    "fp16.loss_scale": [{"fp16": {"loss_scale": "x"}}],
    "fp16.initial_scale_power": [{"fp16": {"initial_scale_power": -3}}],
    "bf16.immediate_grad_update": [{"bf16": {"immediate_grad_update": "q"}}],
    "communication_data_type": [{"communication_data_type": value} for value in ("fp13", 7)],
    "data_types.grad_accum_dtype": [{"data_types": {"grad_accum_dtype": "fp13"}}],
    "activation_checkpointing": [{"activation_checkpointing": 3}],
    "activation_checkpointing.profile": [{"activation_checkpointing": {"profile": "a"}}],
    "flops_profiler": [{"flops_profiler": 5}],
    "aio": [{"aio": 3}],
    "aio.block_size": [{"aio": {"block_size": "x"}}],
    "comms_logger": [{"comms_logger": []}],
    "gradient_predivide_factor": [{"gradient_predivide_factor": value} for value in ("x", 0)],
    "prescale_gradients": [{"prescale_gradients": "x"}],
    "zero_allow_untested_optimizer": [{"zero_allow_untested_optimizer": "x"}],
    "log_level": [{"log_level": "x"}],
    "tensorboard": [{"tensorboard": 4}],
    "tensorboard.enabled": [{"tensorboard": {"enabled": "x"}}],
    "wandb.enabled": [{"wandb": {"enabled": 3}}],
    "compile.deepcompile": [{"compile": {"deepcompile": "x"}}],
    "hybrid_engine": [{"hybrid_engine": 5}],
    "timers": [{"timers": 5}],
    "torch_autocast": [{"torch_autocast": 5}],
    "weight_quantization": [{"weight_quantization": 5}],
}
"""Key to sections in which its value is wrong."""
CASES = [(key, section) for key, sections in WRONG.items() for section in sections]


def check(section: dict[str, Any], ranks: int = 1) -> None:
    """As training and the dry run do."""
    dtype = next((name for name in ("fp16", "bf16") if name in section), "fp32")
    settings = {"model": {"name_or_path": "x", "dtype": dtype}, "train": {"epochs": 1}, "deepspeed": section}
    run: RunConfig = load_values(settings, "test").run
    check_deepspeed_values(run.deepspeed, complete(run, ranks, 32))


@pytest.mark.parametrize(("key", "section"), CASES, ids=[json.dumps(section) for _, section in CASES])
def test_a_wrong_value_is_told_by_its_key(key: str, section: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"deepspeed\.{key.replace('.', '[.]')}( =| is)"):
        check(section)


def test_all_that_deepspeed_refuses_is_told_at_once_and_long_values_are_cut() -> None:
    wrong = {"overlap_comm": "maybe" * 1000, "round_robin_gradients": "x"}
    with pytest.raises(UserError) as caught:
        check({"zero_optimization": {"stage": 2, **wrong}})
    assert all(f"deepspeed.zero_optimization.{key} is" in str(caught.value) for key in wrong)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(
    "section",
    [
        {},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}},
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "gradient_clipping": "auto"},
        {"fp16": {"loss_scale_window": 100}, "activation_checkpointing": {"profile": True}, "steps_per_print": 10},
    ],
)
def test_a_right_section_passes(section: dict[str, Any], ranks: int) -> None:
    check(section, ranks)

"""Predicted shards, gathers and traffic against those of real ZeRO-3 ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, T5ForConditionalGeneration

from adept_ds.backbone.load import load_architecture
from adept_ds.config.run import RunConfig
from adept_ds.planner.memory import Cluster, MemoryModel
from tests.conftest import RunRanks, run_settings
from tests.models import llama_config, save, t5_config

pytestmark = pytest.mark.slow

TIGHT = {"stage3_prefetch_bucket_size": 20_000, "stage3_max_live_parameters": 60_000}
TIGHT |= {"stage3_max_reuse_distance": 50_000, "stage3_param_persistence_threshold": 200}
HYPER = {
    "hyperformer, tight": {"name": "hyperformer", "bottleneck": 12},
    "hyperdecoder, tight": {"name": "hyperdecoder", "bottleneck": 12},
}
"""Methods whose networks are called outside the layers that read what they make."""
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "defaults": ("llama", {}, {}, {}),
    "weight by weight": ("llama", {}, {"gather": "weight"}, {}),
    "tight, by weight, nf4, checkpointed": (
        "llama",
        {"quantization": "nf4"},
        {"activation_checkpointing": True, "gather": "weight"},
        TIGHT,
    ),
    "t5, tight, by weight": ("t5", {}, {"gather": "weight"}, TIGHT),
    "tight, nf4, checkpointed": ("llama", {"quantization": "nf4"}, {"activation_checkpointing": True}, TIGHT),
    "t5, tight": ("t5", {}, {}, TIGHT),
    **dict.fromkeys(HYPER, ("t5", {}, {"learning_rate": {"adapter": 0.001}}, TIGHT)),
}


@pytest.fixture(scope="module")
def backbones(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with enough layers for gathers to come and go."""
    llama = llama_config(vocab_size=400, hidden_size=64, intermediate_size=160, num_hidden_layers=6)
    t5 = t5_config(vocab_size=400, d_model=64, d_kv=16, d_ff=160, num_layers=4, dropout_rate=0.1)
    models = {"llama": LlamaForCausalLM(llama), "t5": T5ForConditionalGeneration(t5)}
    return {name: save(model, tiny_tokenizer, tmp_path_factory.mktemp(name)) for name, model in models.items()}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_hold_and_gather_what_was_planned(
    case: str, backbones: dict[str, Path], run_ranks: RunRanks, tmp_path: Path
) -> None:
    name, model, train, zero = CASES[case]
    settings = run_settings(backbones[name], tmp_path / "run", max_steps=5, warmup_steps=0, **train)
    settings["model"] |= model
    settings["method"] = HYPER.get(case, settings["method"])
    settings["eval"] = {"every_steps": 5, "max_examples": 2}
    settings["deepspeed"]["zero_optimization"] |= zero
    out = tmp_path / "measured.json"
    result = run_ranks(2, "tests/distributed/zero3_meter.py", settings, "--out", str(out))
    assert result.returncode == 0, result.stdout
    measured = json.loads(out.read_text())

    run = RunConfig.model_validate(settings)
    memory = MemoryModel(run, load_architecture(run.model), Cluster(1, 2, 2**30, "cpu"))
    plan = memory.plan("global", with_largest=False)
    step = measured["steps"][3]
    assert plan.memory.backbone == pytest.approx(measured["shard"], rel=0.1)
    assert (plan.memory.gathered, plan.gather_traffic) == (step["peak"], step["gathered"])

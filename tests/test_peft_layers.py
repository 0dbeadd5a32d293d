"""LoRA and (IA)3 on small random models of many architectures: of families, of PEFT's mapping, and of neither."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel

from adept_ds.config.method import AdapterConfig, Ia3Config, LoraConfig, MethodConfig
from adept_ds.errors import UserError
from adept_ds.methods.layers import output_layers
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from tests.models import TOKENS, VOCABULARY, WIDTH, causal, seeded
from tests.test_methods import batch, far_from_start, logits, take_steps


def bart() -> PreTrainedModel:
    both = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
    shape = {f"{part}_{name}": value for name, value in both.items() for part in ("encoder", "decoder")}
    config = BartConfig(vocab_size=VOCABULARY, d_model=WIDTH, dropout=0.0, init_std=0.3, **shape, **TOKENS)
    return BartForConditionalGeneration(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mistral": causal("mistral", num_key_value_heads=2),
    "qwen2": causal("qwen2", num_key_value_heads=2),
    "gemma": causal("gemma", num_key_value_heads=2, head_dim=8),
    "mixtral": causal("mixtral", num_key_value_heads=2, num_local_experts=2),
    "gpt_neox": causal("gpt_neox"),
    "bloom": causal("bloom"),
    "opt": causal("opt", ffn_dim=48, word_embed_proj_dim=WIDTH, dropout=0.0, init_std=0.3),
    "falcon": causal("falcon"),
    "phi": causal("phi"),
    "gptj": causal("gptj", rotary_dim=4),
    "gpt_neo": causal("gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]]),
    "phi3": causal("phi3"),
    "mpt": causal("mpt", d_model=WIDTH, n_heads=4, n_layers=2, max_seq_len=64),
    "persimmon": causal("persimmon"),
    "mamba": causal("mamba"),
    "bart": bart,
}
Q_K_V, Q_V, K_V = {"q_proj", "k_proj", "v_proj"}, {"q_proj", "v_proj"}, {"k_proj", "v_proj"}
FUSED = {"query_key_value"}
LAYERS: dict[str, tuple[set[str], set[str], set[str]]] = {
    # In families: as in the paper.
    "mistral": (Q_K_V, K_V, {"down_proj"}),
    "qwen2": (Q_K_V, K_V, {"down_proj"}),
    "gemma": (Q_K_V, K_V, {"down_proj"}),
    # PEFT's choice.
    "gpt_neox": (FUSED, FUSED, {"dense_4h_to_h"}),
    "bloom": (FUSED, FUSED, {"dense_4h_to_h"}),
    "opt": (Q_V, {"q_proj", "k_proj"}, {"fc2"}),
    "falcon": (FUSED, FUSED, {"dense_4h_to_h"}),
    "phi": (Q_V | {"fc1", "fc2"}, Q_V, {"fc2"}),
    "gptj": (Q_V, Q_V, {"fc_out"}),
    "gpt_neo": (Q_V, Q_V, {"c_proj"}),
    "bart": (Q_V, Q_V, {"fc2"}),
    # Of other families, for which PEFT has no choice, or one for LoRA alone.
    "phi3": ({"qkv_proj"}, {"qkv_proj"}, {"down_proj"}),
    "mpt": ({"Wqkv"}, {"Wqkv"}, {"down_proj"}),
    "persimmon": (FUSED, FUSED, {"dense_4h_to_h"}),
}
"""Ends of the names of layers: for LoRA, for (IA)3 without and with `feed_forward`."""
LORA, IA3 = LoraConfig(rank=3, dropout=0.0), Ia3Config(feed_forward=True)


def adapted(name: str, method: MethodConfig) -> AdaptedModel:
    return get_adept_model(seeded(MODELS[name]), method)


def changed_layers(model: AdaptedModel) -> set[str]:
    return {
        re.sub(r"\.(lora_[AB]\.weight|ia3_l)$", "", name).rpartition(".")[2] for name in model.trainable_parameters()
    }


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_the_family_or_pefts_choice(name: str) -> None:
    low_rank, keys_values, feed_forward = LAYERS[name]
    assert changed_layers(adapted(name, LORA)) == low_rank
    assert changed_layers(adapted(name, Ia3Config())) == keys_values
    assert changed_layers(adapted(name, IA3)) == keys_values | feed_forward


@pytest.mark.parametrize("method", [LORA, IA3], ids=["lora", "ia3"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_loss_falls(name: str, method: MethodConfig) -> None:
    model = adapted(name, method).train()
    losses = take_steps(model, batch(model), steps=5)
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize("method", [LORA, IA3], ids=["lora", "ia3"])
@pytest.mark.parametrize("name", LAYERS)
def test_it_can_be_saved_and_switched_off(tmp_path: Path, name: str, method: MethodConfig) -> None:
    model = far_from_start(adapted(name, method))
    model.save_pretrained(tmp_path)
    loaded = AdaptedModel.from_pretrained(seeded(MODELS[name]), tmp_path).eval()
    plain = logits(seeded(MODELS[name]))
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(model), plain, atol=1e-2)
    with model.disable_adapter():
        assert torch.allclose(logits(model), plain, atol=1e-5)


# Layers that are not known

MAMBA = r"\(model type 'mamba'\) has linear layers whose names end in in_proj, x_proj, dt_proj, out_proj"


@pytest.mark.parametrize("method", [LORA, Ia3Config(), IA3], ids=["lora", "ia3", "ia3-feed-forward"])
def test_an_architecture_that_nobody_knows_is_refused_with_the_layers_that_it_has(method: MethodConfig) -> None:
    message = rf"{MAMBA}; which of them {method.name} is for is known neither .*: set method\.target_modules"
    with pytest.raises(UserError, match=message):
        adapted("mamba", method)


def test_there_the_layers_can_be_named() -> None:
    model = adapted("mamba", LoraConfig(target_modules=("in_proj", "mixer.x_proj")))
    assert changed_layers(model) == {"in_proj", "x_proj"}


def test_a_feed_forward_part_of_experts_is_not_left_out_silently() -> None:
    with pytest.raises(UserError, match=r"'mixtral'.* known neither .*: set method\.feed_forward to false"):
        adapted("mixtral", IA3)
    assert changed_layers(adapted("mixtral", Ia3Config())) == K_V


def test_one_name_among_others_that_no_layer_has_is_refused() -> None:
    message = r"method\.target_modules has 'qkv_porj'; .*model type 'phi3'.*; did you mean 'qkv_proj'\?"
    with pytest.raises(UserError, match=message):
        adapted("phi3", LoraConfig(target_modules=("o_proj", "qkv_porj")))


def test_a_layer_that_peft_cannot_wrap_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.target_modules does not fit .*RMSNorm"):
        adapted("phi3", LoraConfig(target_modules=("input_layernorm",)))


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("mixtral",)])
def test_bottleneck_adapters_stand_behind_both_parts_of_each_layer(name: str) -> None:
    blocks = 4 if name == "bart" else 2
    assert len(output_layers(seeded(MODELS[name]))) == 2 * blocks


def test_bottleneck_adapters_say_which_backbones_they_know() -> None:
    message = r"built like T5, Llama, .* MPT; '' \(model type 'mixtral'\) has .*q_proj, .*lora and ia3"
    with pytest.raises(UserError, match=message):
        adapted("mixtral", AdapterConfig())

"""The attention that a backbone is loaded with: any that transformers has by name, refused before weights are read."""

from __future__ import annotations

import pytest
from transformers import CodeGenConfig, PreTrainedConfig

from adept_ds.backbone.load import check_attention, load_architecture, load_backbone
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError
from tests.models import llama_config, t5_config


def model(attention: str | None, path: object = "somewhere") -> ModelConfig:
    return ModelConfig(name_or_path=str(path), attn_implementation=attention, dtype="fp32")


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_an_attention_is_the_one_that_was_named(attention, tiny_llama):
    backbone = load_backbone(model(attention, tiny_llama), show_progress=False)
    assert backbone.config._attn_implementation == attention


@pytest.mark.parametrize(
    "architecture", [llama_config(), t5_config(), CodeGenConfig(n_layer=1)], ids=lambda c: c.model_type
)
def test_the_choice_of_transformers_passes(architecture: PreTrainedConfig):
    check_attention(model(None), architecture)


@pytest.mark.parametrize(
    ("architecture", "attention", "working"),
    [
        (t5_config(), "flash_attention_2", "expected eager or .*sdpa"),
        (CodeGenConfig(n_layer=1), "sdpa", "expected eager$"),
        (CodeGenConfig(n_layer=1), "flex_attention", "expected eager$"),
    ],
)
def test_an_attention_that_the_model_has_not_is_refused_with_those_that_it_has(architecture, attention, working):
    with pytest.raises(
        UserError, match=rf"model\.attn_implementation is '{attention}', which does not work here: .*{working}"
    ):
        check_attention(model(attention), architecture)


def test_a_kernel_of_a_publisher_whom_nobody_vouches_for_is_refused():
    with pytest.raises(UserError, match=r"model\.attn_implementation is 'someone/kernel', which does not work here"):
        check_attention(model("someone/kernel"), llama_config())


@pytest.mark.parametrize(("attention", "near"), [("flash_atention_2", "flash_attention_2"), ("paged|eager", "eager")])
def test_an_unknown_attention_is_refused_with_the_nearest_wherever_the_model_is_planned(attention, near, tiny_llama):
    with pytest.raises(UserError, match=rf"model\.attn_implementation is .*did you mean '{near}'"):
        load_architecture(model(attention, tiny_llama))

"""Tuning methods by name; each is one file behind the protocol of `adept_ds.methods.base`."""

from __future__ import annotations

from typing import Any

from adept_ds.config.method import MethodConfig
from adept_ds.methods.adept import Adept
from adept_ds.methods.attempt import Attempt
from adept_ds.methods.base import Method
from adept_ds.methods.bitfit import BitFit
from adept_ds.methods.bottleneck import Bottleneck
from adept_ds.methods.dept import Dept
from adept_ds.methods.full import Full
from adept_ds.methods.hyperdecoder import HyperDecoder
from adept_ds.methods.hyperformer import HyperFormer
from adept_ds.methods.lst import LadderSideTuning
from adept_ds.methods.made_prompts import DecomposedPromptTuning, ResidualPromptTuning
from adept_ds.methods.mpt import MultitaskPromptTuning
from adept_ds.methods.p_tuning import PTuning
from adept_ds.methods.peft_layers import Ia3, Lora, Vera
from adept_ds.methods.prefix import PrefixTuning
from adept_ds.methods.prompt_tuning import PromptEmbedding, PromptTuning
from adept_ds.methods.untuned import Untuned

_METHODS: dict[str, Any] = {
    "adept": Adept,
    "pt": PromptTuning,
    "dept": Dept,
    "pt_embedding": PromptEmbedding,
    "p_tuning": PTuning,
    "dpt": DecomposedPromptTuning,
    "residual_pt": ResidualPromptTuning,
    "mpt": MultitaskPromptTuning,
    "attempt": Attempt,
    "prefix": PrefixTuning,
    "lora": Lora,
    "ia3": Ia3,
    "vera": Vera,
    "adapter": Bottleneck,
    "adapter_drop": Bottleneck,
    "hyperformer": HyperFormer,
    "hyperdecoder": HyperDecoder,
    "bitfit": BitFit,
    "lst": LadderSideTuning,
    "full": Full,
}
"""Class of each method, made from its settings."""


def create_method(config: MethodConfig) -> Method:
    """Return the method that the settings describe, not yet injected into a backbone."""
    return _METHODS[config.name](config)


__all__ = ["Adept", "Full", "Method", "Untuned", "create_method"]

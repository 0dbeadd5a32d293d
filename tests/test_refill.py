"""Decoding with refill: the samples are those of batches that are decoded to their ends, whatever comes and goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from adept_ds.config.method import (
    AdeptConfig,
    AttemptConfig,
    IA3Config,
    LoraConfig,
    MptConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from adept_ds.config.run import DataConfig, GenerationConfig
from adept_ds.data.problems import load_problems
from adept_ds.distributed import World
from adept_ds.evaluation import generate, refill
from adept_ds.evaluation.generate import generate_samples
from adept_ds.evaluation.sampling import Sampling, generator_of
from adept_ds.formats import Problem, Sample
from adept_ds.methods import Untuned, create_method
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.model.slots import refusal
from tests.models import causal, seeded

Make = Callable[[str], PreTrainedModel]
DATA = DataConfig(format="mbpp-paper", max_prompt_length=60, max_length=100)

METHODS: dict[str, Any] = {
    "adept": AdeptConfig(num_virtual_tokens=3, bottleneck=2),
    "pt": PromptTuningConfig(num_virtual_tokens=4),
    "prefix": PrefixTuningConfig(prefix_length=3),
    "lora": LoraConfig(rank=2),
    "ia3": IA3Config(),
    "attempt": AttemptConfig(num_virtual_tokens=3, bottleneck=2, source_prompts={"a": "none", "b": "none"}),
    "none": None,
}

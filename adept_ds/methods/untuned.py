"""The backbone as it is: what every tuned figure is compared with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.methods.base import MethodDefaults


class Untuned(MethodDefaults):
    """Trains nothing and changes nothing."""

    def __init__(self) -> None:
        self.config = None
        self.num_virtual_tokens = 0

    @override
    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        pass

    @override
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {}

    @override
    def learning_rate_group(self, name: str) -> str:
        raise KeyError(name)

    @override
    def disabled(self) -> AbstractContextManager[None]:
        return nullcontext()

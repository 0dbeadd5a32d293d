"""The backbone as it is: what every tuned figure is compared with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adept_ds.methods.base import MethodDefaults


class Untuned(MethodDefaults):
    """Trains nothing and changes nothing."""

    config = None
    num_virtual_tokens = 0

    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        """See `Method.inject`."""

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """See `Method.trained_parameters`."""
        return {}

    def learning_rate_group(self, name: str) -> str:
        """See `Method.learning_rate_group`."""
        raise KeyError(name)

    def disabled(self) -> AbstractContextManager[None]:
        """See `Method.disabled`."""
        return nullcontext()

"""Full fine-tuning as a method: all weights of the backbone are trained, none are added."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adept_ds.config.method import FullConfig
from adept_ds.errors import UserError
from adept_ds.methods.base import MethodDefaults


class Full(MethodDefaults):
    """Trains every parameter of the backbone, tied ones once."""

    num_virtual_tokens = 0

    def __init__(self, config: FullConfig) -> None:
        self.config = config

    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        """See `Method.inject`."""
        backbone.requires_grad_(True)
        self._backbone = backbone

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """See `Method.trained_parameters`."""
        return dict(self._backbone.named_parameters())

    def learning_rate_group(self, name: str) -> str:
        """See `Method.learning_rate_group`."""
        return "backbone"

    def disabled(self) -> AbstractContextManager[None]:
        """See `Method.disabled`. There is no way back to the backbone as it was.

        Raises:
            UserError: Always.
        """
        raise UserError("full fine-tuning changes the backbone itself; load the backbone anew to have it as it was")

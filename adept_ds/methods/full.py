"""Full fine-tuning as a method: all weights of the backbone are trained, none are added."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.config.method import FullConfig
from adept_ds.errors import UserError
from adept_ds.methods.base import MethodDefaults


class Full(MethodDefaults):
    """Trains every parameter of the backbone, tied ones once."""

    config: FullConfig

    @override
    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        backbone.requires_grad_(True)
        self._backbone = backbone

    @override
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._backbone.named_parameters())

    @override
    def learning_rate_group(self, name: str) -> str:
        return "backbone"

    @override
    def disabled(self) -> AbstractContextManager[None]:
        """There is no way back to the backbone as it was.

        Raises:
            UserError: Always.
        """
        raise UserError("full fine-tuning changes the backbone itself; load the backbone anew to have it as it was")

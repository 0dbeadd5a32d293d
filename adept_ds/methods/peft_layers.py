"""Methods whose layers HF PEFT makes and puts into the backbone: LoRA and (IA)3."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adept_ds.contexts import seeded
from adept_ds.errors import UserError
from adept_ds.methods.base import MethodDefaults
from adept_ds.methods.layers import layer_names

_ADAPTER = "default"


class PeftLayers(MethodDefaults, ABC):
    """Wraps layers of the backbone in those of PEFT, which call the layer and never read its weight: it may be sharded
    or quantised."""

    num_virtual_tokens = 0

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def peft_config(self, backbone: PreTrainedModel) -> peft.PeftConfig:
        """The settings in PEFT's form."""

    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        """See `Method.inject`.

        Raises:
            UserError: No layer has one of the names, or one that has cannot be wrapped.
        """
        try:
            with seeded(generator):
                peft.inject_adapter_in_model(self.peft_config(backbone), backbone, _ADAPTER)
        except (ValueError, TypeError) as error:
            raise UserError(f"method.target_modules does not fit {backbone.config.name_or_path!r}: {error}") from error
        self._layers = [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]
        self._trained = {
            name.replace(f".{_ADAPTER}", ""): parameter
            for name, parameter in backbone.named_parameters()
            if parameter.requires_grad
        }
        for parameter in self._trained.values():
            parameter.data = parameter.data.float()

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """See `Method.trained_parameters`."""
        return self._trained

    def learning_rate_group(self, name: str) -> str:
        """See `Method.learning_rate_group`."""
        return "adapter"

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See `Method.disabled`."""
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)


class Lora(PeftLayers):
    """LoRA: W x + alpha / r B A x; A [r, in] Kaiming-uniform, B [out, r] zero; made from a `LoraConfig`.

    Parameters: r (in + out) for each layer.
    """

    def peft_config(self, backbone: PreTrainedModel) -> peft.PeftConfig:
        """See `PeftLayers.peft_config`."""
        config = self.config
        return peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules or layer_names(backbone).low_rank),
        )


class Ia3(PeftLayers):
    """(IA)3: s * (W x) for keys and values, W (s * x) for the feed-forward layers' last projection; s one at the start;
    made from an `Ia3Config`."""

    def peft_config(self, backbone: PreTrainedModel) -> peft.PeftConfig:
        """See `PeftLayers.peft_config`."""
        config = self.config
        feed_forward = [layer_names(backbone).feed_forward_output] if config.feed_forward else []
        targets = config.target_modules or layer_names(backbone).keys_values
        return peft.IA3Config(target_modules=[*targets, *feed_forward], feedforward_modules=feed_forward)

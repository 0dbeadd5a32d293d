"""BitFit (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199): a trained term in the place of every bias.

    y = layer(x) + b      b zero at the start

Where the layer has a bias, b adds to it, which comes to training that. T5 and Llama have none; there the linear layers,
the LM head included, and the layer norms of the blocks get one, as in Karimi Mahabadi et al. 2021
(https://arxiv.org/abs/2106.04647), whose figure for T5-base the paper quotes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from adept_ds.backbone.sharding import full_shape
from adept_ds.config.method import BitFitConfig
from adept_ds.contexts import attribute_set
from adept_ds.methods.base import MethodDefaults
from adept_ds.methods.layers import layer_index, norms, replace

HEAD = "lm_head.bias"
"""Name of the LM head's bias in the adapter file."""


class BiasedLayer(nn.Module):
    """layer(x) + bias, the sum in fp32 and cast once."""

    def __init__(self, layer: nn.Module, width: int, device: torch.device) -> None:
        super().__init__()
        self.layer = layer
        self.bias = nn.Parameter(torch.zeros(width, device=device))
        self.enabled = True

    @property
    def weight(self) -> Any:
        """The layer's, which T5 asks for its dtype."""
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        y = self.layer(x)
        return (y.float() + self.bias.float()).to(y.dtype) if self.enabled else y


class BitFit(MethodDefaults):
    """Trains biases; made from a `BitFitConfig`."""

    def __init__(self, config: BitFitConfig) -> None:
        self.config = config
        self.num_virtual_tokens = 0

    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        """See `Method.inject`."""
        self._backbone = backbone
        head = cast(nn.Linear, backbone.get_output_embeddings())
        device = cast(nn.Embedding, backbone.get_input_embeddings()).weight.device
        block_norms = {name: norm for name, norm in norms(backbone).items() if layer_index(name) is not None}
        linears = {
            name: module
            for name, module in backbone.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head
        }
        layers = linears | block_norms
        biased = {name: layer for name, layer in layers.items() if getattr(layer, "bias", None) is not None}
        self._has_head = not biased and head.bias is None
        self._changed = {
            name: BiasedLayer(layer, _output_width(layer), device) for name, layer in (biased or layers).items()
        }
        for name, module in self._changed.items():
            replace(backbone, name, module)
        if self._has_head:
            head.bias = nn.Parameter(torch.zeros(head.out_features, device=device))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """See `Method.trained_parameters`."""
        parameters = {f"{name}.bias": module.bias for name, module in self._changed.items()}
        return parameters | ({HEAD: self._backbone.get_output_embeddings().bias} if self._has_head else {})

    def learning_rate_group(self, name: str) -> str:
        """See `Method.learning_rate_group`."""
        return "adapter"

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See `Method.disabled`."""
        head = self._backbone.get_output_embeddings()
        bias = head.bias
        with ExitStack() as stack:
            for module in self._changed.values():
                stack.enter_context(attribute_set(module, "enabled", False))
            if self._has_head:
                head.bias = None
            try:
                yield
            finally:
                head.bias = bias


def _output_width(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.nf if isinstance(layer, Conv1D) else full_shape(cast(Tensor, layer.weight))[0]

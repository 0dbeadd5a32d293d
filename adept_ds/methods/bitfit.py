"""BitFit (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199): a trained term in the place of every bias.

    y = layer(x) + b      b zero at the start

A layer that has a bias keeps it, and b is added to it, which is the same as training the bias; so it is with every bias
of the backbone, those of the last norm and of the LM head included. T5 and Llama have no biases: there b is put behind
all linear layers, the LM head included, and behind the layer norms of the blocks, as in
Karimi Mahabadi et al. 2021 (https://arxiv.org/abs/2106.04647), whose figure for T5-base the paper quotes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from adept_ds.backbone.sharding import full_shape
from adept_ds.config.method import BitFitConfig
from adept_ds.methods.layers import embedding_table, layer_index, linear_layers, norms
from adept_ds.methods.wrapped import WrappedLayer, WrappedLayersMethod

HEAD = "lm_head.bias"
"""Name of the LM head's bias in the adapter file."""


class BiasedLayer(WrappedLayer):
    """layer(x) + bias, the sum in fp32 and cast once."""

    def __init__(self, layer: nn.Module, width: int, device: torch.device) -> None:
        super().__init__(layer)
        self.bias = nn.Parameter(torch.zeros(width, device=device))

    @override
    def tuned(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return (y.float() + self.bias.float()).to(y.dtype)


class BitFit(WrappedLayersMethod):
    """Trains biases; made from a `BitFitConfig`."""

    config: BitFitConfig

    @override
    def wrap(self, backbone: PreTrainedModel, generator: torch.Generator | None) -> dict[str, WrappedLayer]:
        head = cast(nn.Linear, backbone.get_output_embeddings())
        device = embedding_table(backbone).weight.device
        block_norms = {name: norm for name, norm in norms(backbone).items() if layer_index(name) is not None}
        layers = linear_layers(backbone) | norms(backbone)
        chosen = {name: layer for name, layer in layers.items() if getattr(layer, "bias", None) is not None}
        self._backbone, self._has_head = backbone, getattr(head, "bias", None) is not None or not chosen
        if self._has_head:
            # Not a `BiasedLayer`: the loss reads the head's weight and biases, see `adept_ds.model.loss.LossHead`.
            head.added_bias = nn.Parameter(torch.zeros(full_shape(head.weight)[0], device=device))
        chosen = chosen or linear_layers(backbone) | block_norms
        return {name: BiasedLayer(layer, _output_width(layer), device) for name, layer in chosen.items()}

    @override
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        head = {HEAD: self._backbone.get_output_embeddings().added_bias} if self._has_head else {}
        return super().trained_parameters() | head

    @contextmanager
    @override
    def disabled(self) -> Iterator[None]:
        head = self._backbone.get_output_embeddings()
        bias = head.added_bias if self._has_head else None
        if self._has_head:
            head.added_bias = None
        try:
            with super().disabled():
                yield
        finally:
            if self._has_head:
                head.added_bias = bias


def _output_width(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.nf if isinstance(layer, Conv1D) else full_shape(cast(Tensor, layer.weight))[0]

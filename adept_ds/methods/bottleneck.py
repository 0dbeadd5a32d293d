"""Bottleneck adapters (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751) and AdapterDrop (Rueckle et al. 2021,
https://arxiv.org/abs/2010.11918), in the places of Karimi Mahabadi et al. 2021 (https://arxiv.org/abs/2106.04647),
whose figures the paper quotes.

    x + W_up act(W_down x + b_down) + b_up      W_down [r, d]   b_down [r]   W_up [d, r]   b_up [d]

behind the self-attention and the feed-forward part of each layer, before the residual sum; the weights of all layer
norms are trained too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from adept_ds.backbone.sharding import gathered
from adept_ds.config.method import AdapterConfig, AdapterDropConfig
from adept_ds.methods.layers import embedding_table, layer_index, norms, output_layers
from adept_ds.methods.wrapped import WrappedLayer, WrappedLayersMethod

_INITIAL_STD = 0.01
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class BottleneckAdapter(nn.Module):
    """x + W_up act(W_down x + b_down) + b_up, computed in fp32 and cast once. The identity at the start.

    Parameters: 2 r d + r + d.
    """

    def __init__(self, width: int, bottleneck: int, activation: str, generator: torch.Generator | None) -> None:
        super().__init__()
        self.w_down = nn.Parameter(torch.empty(bottleneck, width).normal_(std=_INITIAL_STD, generator=generator))
        self.b_down = nn.Parameter(torch.zeros(bottleneck))
        self.w_up = nn.Parameter(torch.zeros(width, bottleneck))
        self.b_up = nn.Parameter(torch.zeros(width))
        self.activation = _ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d], in the dtype of x."""
        hidden = self.activation(F.linear(x.float(), self.w_down.float(), self.b_down.float()))
        return (x.float() + F.linear(hidden, self.w_up.float(), self.b_up.float())).to(x.dtype)


class AdaptedLayer(WrappedLayer):
    """A layer and what is made of its output."""

    def __init__(self, layer: nn.Module, adapter: BottleneckAdapter) -> None:
        super().__init__(layer)
        self.adapter = adapter

    @override
    def tuned(self, x: Tensor) -> Tensor:
        output: Tensor = self.adapter(self.layer(x))
        return output


class TrainedCopy(WrappedLayer):
    """A copy of a layer with trained fp32 parameters."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        with gathered(layer.parameters()):
            parameters = {id(old): nn.Parameter(old.detach().float().clone()) for old in layer.parameters()}
            self.trained = copy.deepcopy(layer, parameters)

    @override
    def tuned(self, x: Tensor) -> Tensor:
        output: Tensor = self.trained(x)
        return output.to(x.dtype)


class Bottleneck(WrappedLayersMethod):
    """Adapters behind the two parts of each layer, and trained layer norms; made from an `AdapterConfig` or an
    `AdapterDropConfig`, which leaves the lowest layers without."""

    config: AdapterConfig | AdapterDropConfig

    @override
    def wrap(self, backbone: PreTrainedModel, generator: torch.Generator | None) -> dict[str, WrappedLayer]:
        """Choose the outputs of each layer's two parts, and the norms.

        Raises:
            UserError: The backbone is of no family.
        """
        config = self.config
        dropped = config.dropped_layers if isinstance(config, AdapterDropConfig) else 0
        table = embedding_table(backbone)
        wrapped: dict[str, WrappedLayer] = {}
        for name, layer in output_layers(backbone).items():
            if (layer_index(name) or 0) >= dropped:
                adapter = BottleneckAdapter(table.embedding_dim, config.bottleneck, config.activation, generator)
                wrapped[name] = AdaptedLayer(layer, adapter.to(table.weight.device))
        if config.train_norms:
            wrapped |= {name: TrainedCopy(norm) for name, norm in norms(backbone).items()}
        return wrapped

"""What methods share whose adapters' weights a network makes for the batch, a hyper-network."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.methods.wrapped import WrappedLayersMethod

_NAME = "hyper_network"
"""Of the network, in the backbone and in the adapter file."""


class Fp32Linear(nn.Linear):
    """W x + b in fp32, as an engine may hold trained parameters in bf16 beside fp32 masters."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        """[..., in] of any dtype to [..., out]."""
        return F.linear(x.float(), self.weight.float(), self.bias.float())


def fp32_linear(
    width_in: int,
    width_out: int,
    draw_weight: Callable[[Tensor], object],
    draw_bias: Callable[[Tensor], object] = nn.init.zeros_,
) -> Fp32Linear:
    """Return a linear layer whose weight [out, in] and bias [out] the two functions have filled in place."""
    layer = nn.utils.skip_init(Fp32Linear, width_in, width_out, device=torch.get_default_device())
    with torch.no_grad():
        draw_weight(layer.weight)
        draw_bias(layer.bias)
    return layer


class HyperNetworkMethod(WrappedLayersMethod):
    """Trains a network beside what it wraps; `wrap` sets `network`."""

    network: nn.Module

    @override
    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        super().inject(backbone, tokenizer, generator)
        backbone.add_module(_NAME, self.network)

    @override
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        made = {f"{_NAME}.{name}": parameter for name, parameter in self.network.named_parameters()}
        return made | super().trained_parameters()

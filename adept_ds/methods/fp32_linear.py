"""Linear layers that compute in fp32, whatever their parameters are stored in."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override


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

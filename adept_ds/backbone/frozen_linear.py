"""Linear layers whose weight is frozen: nothing of the input is kept for the backward pass.

    y = x W^T + b        dL/dx = dL/dy W

The gradient needs the weight alone. PyTorch knows that, but under ZeRO-3 DeepSpeed replaces `F.linear` by a function
that keeps x for the gradient of a weight that has none. Here a reference to the weight is kept, which ZeRO-3 gathers
again before the layer's backward pass.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D


@torch.compiler.assume_constant_result
def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def matmul(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., n] @ y [n, m] + bias [m] in the dtype of x, accumulated in fp32 on every device and rounded once.

    Leading dimensions are made one first: torch would else copy y once for each row of an x that is a slice, such as
    the last position of a prompt on its way into the head.
    """
    return _matmul_rows(x.reshape(-1, x.shape[-1]), y, bias).unflatten(0, x.shape[:-1])


def _matmul_rows(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """`matmul` of x [N, n].

    On a CPU without bf16 instructions torch's bf16 products are up to 30 times slower than fp32 ones, so there the
    operands are widened and the result is rounded once, which is what bf16 hardware computes.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not has_fast_bf16():
        return _matmul_rows(x.float(), y.float(), None if bias is None else bias.float()).bfloat16()
    return x @ y if bias is None else torch.addmm(bias.to(x.dtype), x, y)


class _FrozenLinearFunction(torch.autograd.Function):
    """Of [..., in_features] to [..., out_features]. Shapes change in here, where no node of the graph comes of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        # The layer and not a saved tensor: ZeRO-3 exchanges the data of its parameters between the two passes.
        ctx.layer = layer
        rows = layer.product(x.reshape(-1, layer.in_features))
        # Models may add to what it returns in place, but not to a view.
        return torch.ops.aten._unsafe_view(rows, (*x.shape[:-1], layer.out_features))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer, (grad,) = ctx.layer, grads
        rows = layer.input_gradient(grad.reshape(-1, layer.out_features))
        return rows.view(*grad.shape[:-1], layer.in_features), None


class _TracedProduct(torch.autograd.Function):
    """`_FrozenLinearFunction` as a compiler traces it: of tensors alone, which become inputs of the compiled block.

    The weight itself is saved and no view of it, so that the backward pass reads what lies in the parameter by then.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.is_transposed = is_transposed
        return _matmul_rows(x, weight if is_transposed else weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _matmul_rows(grads[0], weight.t() if ctx.is_transposed else weight), None, None, None


class FrozenLinear(nn.Linear):
    """A linear layer that shares a frozen one's parameters and saves a reference to the weight only.

    Args:
        linear: An `nn.Linear`, or a `Conv1D` of `transformers`, whose weight is [in_features, out_features].
    """

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        nn.Module.__init__(self)
        self.is_transposed = isinstance(linear, Conv1D)
        if isinstance(linear, Conv1D):
            self.in_features, self.out_features = linear.nx, linear.nf
        else:
            self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features] as it enters the product."""
        return self.weight.t() if self.is_transposed else self.weight

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b of rows [N, in_features]."""
        return _matmul_rows(x, self.dense_weight().t(), self.bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """dL/dx of dL/dy [N, out_features]."""
        return _matmul_rows(grad, self.dense_weight())

    def traced_product(self, rows: Tensor) -> Tensor:
        """Rows [N, in_features] to [N, out_features], for a compiler: it traces functions of tensors, not of layers,
        and one trace serves all layers of this shape."""
        return _TracedProduct.apply(rows, self.weight, self.bias, self.is_transposed)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        if torch.compiler.is_compiling():
            rows = self.traced_product(input.reshape(-1, self.in_features))
        elif torch.is_grad_enabled():
            return _FrozenLinearFunction.apply(input, self)
        else:  # the same without the host's work for a node of the graph
            rows = self.product(input.reshape(-1, self.in_features))
        return rows.unflatten(0, input.shape[:-1])


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether the module is a linear layer and nothing more: of other subclasses one cannot know what they compute."""
    return type(module) in (nn.Linear, Conv1D, FalconLinear)


def replace_frozen_linears(model: nn.Module) -> int:
    """Exchange every plain linear layer with frozen parameters in place; return how many there were."""
    replaced = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if is_linear(child) and not any(parameter.requires_grad for parameter in child.parameters()):
                setattr(module, name, FrozenLinear(child))
                replaced += 1
    return replaced

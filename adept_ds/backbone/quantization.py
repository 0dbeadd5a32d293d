"""4-bit and 8-bit weights of frozen linear layers, held in one flat tensor each so that ZeRO-3 shards all of it.

bitsandbytes keeps a layer's codes in one tensor and its scales in another that DeepSpeed does not see, so the scales
stay whole on every rank. Here both lie in one 1-D tensor of the model's own dtype:

    [ scales, fp32 | 8-bit scales, double quantisation only | codes | zeros up to 16 bytes ]

which is gathered, moved and released like any other parameter. The dtype says nothing about the content: DeepSpeed
casts every parameter of another precision than the model's, and bytes must not be cast.

Source of the formats: Dettmers et al. 2023 (QLoRA), sections 2 and 3; Dettmers et al. 2022 (8-bit optimizers). The
arithmetic is that of bitsandbytes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from adept_ds.backbone.frozen_linear import FrozenLinear, is_linear
from adept_ds.backbone.sharding import full_numel
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError

_ALIGNMENT = 16
_SCALES_PER_NESTED_BLOCK = 256
_BLOCK_SIZE = {"nf4": 64, "int8": 256}
_PART_ELEMENTS = 2**20
"""A multiple of all block sizes."""
_NOTED_SHARE = 0.05
"""Of the parameters."""


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of bitsandbytes' 8-bit code [256], fp32."""
    return bnb.create_dynamic_map().to(device)


def _blocks(numel: int, size: int) -> int:
    return -(-numel // size)


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantised: `nf4` in blocks of 64 or `int8` in blocks of 256, each block scaled by its absmax.

    With `double` (nf4 only) the scales themselves are 8-bit codes in blocks of 256, around their mean.
    """

    name: str
    double: bool = False

    @classmethod
    def of(cls, config: ModelConfig) -> Scheme | None:
        """The scheme that the config asks for; None keeps the weights as they are."""
        return cls(config.quantization, config.double_quantization) if config.quantization else None

    @cache  # noqa: B019  (a handful of schemes, which live as long as the process)
    def _sections(self, numel: int) -> tuple[tuple[torch.dtype, int], ...]:
        """Dtype and length of the parts of the storage of a weight with `numel` elements, padding included."""
        blocks = _blocks(numel, _BLOCK_SIZE[self.name])
        codes = _blocks(numel, 2) if self.name == "nf4" else numel
        scales: tuple[tuple[torch.dtype, int], ...] = ((torch.float32, blocks),)
        if self.double:
            scales = (torch.float32, 1 + _blocks(blocks, _SCALES_PER_NESTED_BLOCK)), (torch.uint8, blocks)
        sections = *scales, (torch.uint8, codes)
        used = sum(dtype.itemsize * length for dtype, length in sections)
        return *sections, (torch.uint8, -used % _ALIGNMENT)

    def storage_bytes(self, numel: int) -> int:
        """Bytes that a weight of `numel` elements takes, scales included."""
        return sum(dtype.itemsize * length for dtype, length in self._sections(numel))

    @torch.no_grad()
    def quantize(self, weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the storage of `weight` [...], rounded to `dtype` first: 1-D, in `dtype`, on `device`.

        A million elements at a time, for which bitsandbytes needs 25 MB on a CPU; `weight` may be a mapped file.
        """
        parts = [self._quantize_part(part.to(device, dtype)) for part in weight.reshape(-1).split(_PART_ELEMENTS)]
        absmax, codes = (torch.cat(column) for column in zip(*parts, strict=True))
        scales = [absmax]
        if self.double:
            mean = absmax.mean()
            codes_of_scales, nested = bnb.quantize_blockwise(
                absmax - mean, code=_dynamic_map(device), blocksize=_SCALES_PER_NESTED_BLOCK
            )
            scales = [torch.cat([mean.view(1), nested.absmax]), codes_of_scales]
        pieces = [piece.view(torch.uint8) for piece in [*scales, codes]]
        _, padding = self._sections(weight.numel())[-1]
        return torch.cat([*pieces, codes.new_zeros(padding)]).view(dtype)

    def _quantize_part(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Return absmax and codes of whole blocks [n]."""
        size = _BLOCK_SIZE[self.name]
        if self.name == "nf4":
            codes, state = bnb.quantize_4bit(part, blocksize=size, quant_type=self.name)
        else:
            codes, state = bnb.quantize_blockwise(part, code=_dynamic_map(part.device), blocksize=size)
        return state.absmax, codes.view(-1)

    def dequantize(self, storage: Tensor, shape: torch.Size) -> Tensor:
        """Return the weight [*shape] in the dtype of its `storage`."""
        # Few calls: on a GPU a layer's product may take no longer than these lines on the host.
        sections = self._sections(shape.numel())
        pieces = storage.view(torch.uint8).split([dtype.itemsize * length for dtype, length in sections])
        *scales, codes = (piece.view(dtype) for piece, (dtype, _) in zip(pieces[:-1], sections[:-1], strict=True))
        absmax, size = scales[-1], _BLOCK_SIZE[self.name]
        if self.double:
            code = _dynamic_map(storage.device)
            nested = bnb.QuantState(scales[0][1:], code=code, blocksize=_SCALES_PER_NESTED_BLOCK, dtype=torch.float32)
            absmax = bnb.dequantize_blockwise(absmax, nested) + scales[0][0]
        if self.name == "nf4":
            # Blocks run on from row to row, but bitsandbytes' AVX-512 kernel begins a new one with every row, and would
            # scale rows that are no whole blocks by absmax of others: those are expanded as one row.
            rows = shape if shape[-1] % size == 0 else torch.Size((1, shape.numel()))
            state = bnb.QuantState(absmax, shape=rows, dtype=storage.dtype, blocksize=size, quant_type=self.name)
            return bnb.dequantize_4bit(codes.view(-1, 1), state).view(shape)
        state = bnb.QuantState(absmax, code=_dynamic_map(storage.device), blocksize=size, dtype=storage.dtype)
        return bnb.dequantize_blockwise(codes.view(shape), state)


_STAND_INS: dict[str, QuantizedLinear] = {}
"""A layer without weights for each `kind`, which computes with the weight that a compiled block hands to it."""


@contextmanager
def _holding(kind: str, storage: Tensor, bias: Tensor | None = None) -> Iterator[QuantizedLinear]:
    layer = _STAND_INS[kind]
    vars(layer).update(weight=storage, bias=bias)
    try:
        yield layer
    finally:
        vars(layer).update(weight=None, bias=None)


# A compiler sees no more of these than their names. Were the expansion in its sight, it would keep the weight that the
# forward pass has expanded for the backward pass, and so all weights of a model.
@torch.library.custom_op("adept_ds::quantized_product", mutates_args=())
def _quantized_product(x: Tensor, storage: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    with _holding(kind, storage, bias) as layer:
        return layer.product(x)


@torch.library.custom_op("adept_ds::quantized_input_gradient", mutates_args=())
def _quantized_input_gradient(grad: Tensor, storage: Tensor, kind: str) -> Tensor:
    with _holding(kind, storage) as layer:
        return layer.input_gradient(grad)


@_quantized_product.register_fake
def _(x: Tensor, storage: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return x.new_empty(x.shape[0], _STAND_INS[kind].out_features)


@_quantized_input_gradient.register_fake
def _(grad: Tensor, storage: Tensor, kind: str) -> Tensor:
    return grad.new_empty(grad.shape[0], _STAND_INS[kind].in_features)


def _keep_storage(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, storage, _, ctx.kind = inputs
    ctx.save_for_backward(storage)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (storage,) = ctx.saved_tensors
    return _quantized_input_gradient(grad, storage, ctx.kind), None, None, None


_quantized_product.register_autograd(_product_backward, setup_context=_keep_storage)


class QuantizedLinear(FrozenLinear):
    """A frozen linear layer on a quantised weight, which is expanded for the product and dropped after it.

        y = x W^T + b      dL/dx = dL/dy W      W = dequantize(storage)

    Args:
        linear: The layer whose place it takes; its weight's values are not read. That of a `Conv1D` is held as
            [out_features, in_features] too, which is also how bitsandbytes' layers have it.
        scheme: How the weight is held.
    """

    def __init__(self, linear: nn.Linear | Conv1D, scheme: Scheme) -> None:
        super().__init__(linear)
        self.scheme = scheme
        numel, dtype = linear.weight.numel(), linear.weight.dtype
        storage = torch.empty(scheme.storage_bytes(numel) // dtype.itemsize, dtype=dtype, device=linear.weight.device)
        self.weight = nn.Parameter(storage, requires_grad=False)
        # For counts of parameters; DeepSpeed knows the storage's own length only.
        self.weight.dense_numel = numel  # type: ignore[attr-defined]
        self.kind = f"{type(self).__name__}({self.in_features}, {self.out_features}, {scheme})"
        if self.kind not in _STAND_INS:
            _STAND_INS[self.kind] = stand_in = copy.copy(self)
            vars(stand_in).update(_parameters={}, weight=None, bias=None)

    def storage_of(self, weight: Tensor, device: torch.device) -> Tensor:
        """The storage on `device` of a weight that has the shape of the layer whose place this one took."""
        return self.scheme.quantize(weight.t() if self.is_transposed else weight, device, self.weight.dtype)

    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features], expanded anew."""
        return self.scheme.dequantize(self.weight, torch.Size((self.out_features, self.in_features)))

    @override
    def traced_product(self, rows: Tensor) -> Tensor:
        return _quantized_product(rows, self.weight, self.bias, self.kind)

    def extra_repr(self) -> str:
        """As `nn.Linear`, with the scheme."""
        return f"{super().extra_repr()}, {self.scheme}"


def quantize_linears(backbone: PreTrainedModel, scheme: Scheme) -> dict[str, QuantizedLinear]:
    """Exchange every linear layer but the LM head for a quantised one whose storage is not filled yet.

    State-space mixers (Mamba, with its parameters A and D) keep theirs: they read the weights and do not call the
    layers.

    Returns:
        Name of the weight, as it was, to its new layer.

    Raises:
        UserError: There is no such layer.
    """
    head, replaced = backbone.get_output_embeddings(), {}
    for parent_name, parent in list(backbone.named_modules()):
        if hasattr(parent, "A_log") and hasattr(parent, "D"):
            continue
        for name, child in list(parent.named_children()):
            if is_linear(child) and child is not head:
                layer = QuantizedLinear(child, scheme)
                setattr(parent, name, layer)
                replaced[f"{parent_name}.{name}.weight".lstrip(".")] = layer
    if not replaced:
        raise UserError(
            f"model.quantization is {scheme.name!r}, which converts linear layers, and {type(backbone).__name__} has "
            "none that can be; expected null"
        )
    return replaced


def unquantized_note(backbone: PreTrainedModel) -> str | None:
    """Say how much of a quantised backbone is still in its full precision, tables and head aside; None where
    that is next to nothing. The experts of most mixtures are no linear layers but stacked into one parameter."""
    quantized = {id(module.weight) for module in backbone.modules() if isinstance(module, QuantizedLinear)}
    if not quantized:
        return None
    tables = [module for module in backbone.modules() if isinstance(module, nn.Embedding)]
    apart = {id(layer.weight) for layer in [*tables, backbone.get_output_embeddings()]}
    plain = {
        name: full_numel(parameter)
        for name, parameter in backbone.named_parameters()
        if id(parameter) not in quantized | apart and not parameter.requires_grad
    }
    count, total = sum(plain.values()), sum(full_numel(parameter) for parameter in backbone.parameters())
    if count < _NOTED_SHARE * total:
        return None
    largest = max(plain, key=lambda name: plain[name])
    return (
        f"{count:,} of {total:,} parameters ({count / total:.0%}) are in no linear layer and stay in "
        f"{str(backbone.dtype).removeprefix('torch.')}, such as {largest}"
    )

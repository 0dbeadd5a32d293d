"""4-bit and 8-bit weights of frozen linear layers, held in one flat tensor each so that ZeRO-3 shards all of it.

bitsandbytes keeps a layer's codes in one tensor and its scales in another that DeepSpeed does not see, so the scales
stay whole on every rank. Here both lie in one 1-D tensor of the model's own dtype:

    [ scales, fp32 | 8-bit scales, double quantisation only | codes | zeros up to 16 bytes ]

which is gathered, moved and released like any other parameter. The dtype says nothing about the content: DeepSpeed
casts every parameter of another precision than the model's, and bytes must not be cast.

Source of the formats: Dettmers et al. 2023 (QLoRA), sections 2 and 3; Dettmers et al. 2022 (8-bit optimizers);
Micikevicius et al. 2022 (FP8 formats for deep learning). The arithmetic of nf4 and int8 is that of bitsandbytes, and
those layers multiply in the model's precision; fp8 layers multiply the 8-bit floats themselves (`fp8`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
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

from adept_ds.backbone.fp8 import E4M3, matmul_fp8, round_rows
from adept_ds.backbone.frozen_linear import FrozenLinear, is_linear, matmul
from adept_ds.backbone.sharding import full_numel, is_sharded
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError

_ALIGNMENT = 16
_SCALES_PER_NESTED_BLOCK = 256
_BLOCK_SIZE = {"nf4": 64, "int8": 256}
_PART_ELEMENTS = 2**20
"""A multiple of all block sizes."""
_DEQUANTIZE_4BIT = torch.ops.bitsandbytes.dequantize_4bit.default
_MULTIPLY_4BIT = torch.ops.bitsandbytes.gemm_4bit.default
_DEQUANTIZE_8BIT = torch.ops.bitsandbytes.dequantize_blockwise.default
_NOTED_SHARE = 0.05
"""Of the parameters."""


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of bitsandbytes' 8-bit code [256], fp32."""
    return bnb.create_dynamic_map().to(device)


@cache
def _ones(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, device=device)


def _blocks(numel: int, size: int) -> int:
    return -(-numel // size)


def _rows(shape: torch.Size) -> torch.Size:
    """The shape in which bitsandbytes expands a nf4 weight [*shape].

    Blocks run on from row to row, but its AVX-512 kernel begins a new one with every row, and would scale rows that are
    no whole blocks by absmax of others: those are expanded as one row.
    """
    return shape if shape[-1] % _BLOCK_SIZE["nf4"] == 0 else torch.Size((1, shape.numel()))


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantised: `nf4` in blocks of 64 or `int8` in blocks of 256, each block scaled by its absmax;
    or `fp8`, e4m3 with a scale for each output row, by which its absmax is the type's largest value.

    With `double` (nf4 only) the scales themselves are 8-bit codes in blocks of 256, around their mean.
    """

    name: str
    double: bool = False
    keeps_expanded: bool = False
    """Whether a weight that a recomputed layer has expanded stays for the layer's backward pass."""

    @classmethod
    def of(cls, config: ModelConfig) -> Scheme | None:
        """The scheme that the config asks for; None keeps the weights as they are."""
        if config.quantization is None:
            return None
        return cls(config.quantization, config.double_quantization, config.keep_expanded)

    @cache  # noqa: B019  (a handful of schemes, which live as long as the process)
    def _sections(self, shape: torch.Size) -> tuple[tuple[torch.dtype, int], ...]:
        """Dtype and length of the parts of the storage of a weight [out_features, in_features], padding included."""
        numel = shape.numel()
        if self.name == "fp8":
            sections: tuple[tuple[torch.dtype, int], ...] = (torch.float32, shape[0]), (E4M3, numel)
        else:
            blocks = _blocks(numel, _BLOCK_SIZE[self.name])
            codes = _blocks(numel, 2) if self.name == "nf4" else numel
            scales: tuple[tuple[torch.dtype, int], ...] = ((torch.float32, blocks),)
            if self.double:
                nested = _blocks(blocks, _SCALES_PER_NESTED_BLOCK)
                scales = (torch.float32, 1), (torch.float32, nested), (torch.uint8, blocks)
            sections = *scales, (torch.uint8, codes)
        used = sum(dtype.itemsize * length for dtype, length in sections)
        return *sections, (torch.uint8, -used % _ALIGNMENT)

    def storage_bytes(self, shape: torch.Size) -> int:
        """Bytes that a weight [out_features, in_features] takes, scales included."""
        return sum(dtype.itemsize * length for dtype, length in self._sections(shape))

    @torch.no_grad()
    def quantize(self, weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the storage of `weight` [out_features, in_features], rounded to `dtype` first: 1-D, in `dtype`, on
        `device`.

        A million elements at a time, for which bitsandbytes needs 25 MB on a CPU; `weight` may be a mapped file.
        """
        if self.name == "fp8":
            whole = weight.split(max(1, _PART_ELEMENTS // weight.shape[1]))
        else:
            whole = weight.reshape(-1).split(_PART_ELEMENTS)
        parts = [self._quantize_part(part.to(device, dtype)) for part in whole]
        absmax, codes = (torch.cat(column) for column in zip(*parts, strict=True))
        scales = [absmax]
        if self.double:
            mean = absmax.mean()
            codes_of_scales, nested = bnb.quantize_blockwise(
                absmax - mean, code=_dynamic_map(device), blocksize=_SCALES_PER_NESTED_BLOCK
            )
            scales = [torch.cat([mean.view(1), nested.absmax]), codes_of_scales]
        pieces = [piece.view(torch.uint8) for piece in [*scales, codes]]
        _, padding = self._sections(weight.shape)[-1]
        return torch.cat([*pieces, pieces[-1].new_zeros(padding)]).view(dtype)

    def _quantize_part(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales and codes of whole blocks [n], or of whole rows [n, in_features]."""
        if self.name == "fp8":
            codes, scales = round_rows(part)
            return scales.view(-1), codes.view(-1)
        size = _BLOCK_SIZE[self.name]
        if self.name == "nf4":
            codes, state = bnb.quantize_4bit(part, blocksize=size, quant_type=self.name)
        else:
            codes, state = bnb.quantize_blockwise(part, code=_dynamic_map(part.device), blocksize=size)
        return state.absmax, codes.view(-1)

    def parts(self, storage: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
        """Views, 1-D, of the `storage` of a weight [*shape]: its scales, mean and scales of the scales first, and its
        codes."""
        sections = self._sections(shape)
        pieces = storage.view(torch.uint8).split([dtype.itemsize * length for dtype, length in sections])
        return tuple(piece.view(dtype) for piece, (dtype, _) in zip(pieces[:-1], sections[:-1], strict=True))

    def dequantize(self, storage: Tensor, shape: torch.Size) -> Tensor:
        """Return the weight [*shape] in the dtype of its `storage`."""
        return self.expand(self.parts(storage, shape), shape, storage.dtype)

    def expand(self, parts: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the weight [*shape] in `dtype` of the `parts` of its storage."""
        # Few calls, and bitsandbytes' operations without the functions around them: on a GPU a layer's product may take
        # no longer than these lines on the host.
        *scales, codes = parts
        if self.name == "fp8":
            return (codes.view(shape).float() * scales[0][:, None]).to(dtype)
        if self.name == "int8":
            code, size = _dynamic_map(codes.device), _BLOCK_SIZE[self.name]
            return _DEQUANTIZE_8BIT(codes, scales[0], code, size, dtype).view(shape)
        absmax, size = self._absmax(scales), _BLOCK_SIZE[self.name]
        return _DEQUANTIZE_4BIT(codes, absmax, size, self.name, _rows(shape), dtype).view(shape)

    def multiplies(self, x: Tensor) -> bool:
        """Whether `product` takes x [N, in_features]: on a GPU, a nf4 weight whose rows are whole blocks."""
        return x.is_cuda and self.name == "nf4" and len(x) > 0 and x.shape[1] % _BLOCK_SIZE["nf4"] == 0

    def product(self, x: Tensor, parts: tuple[Tensor, ...], shape: torch.Size, bias: Tensor | None) -> Tensor:
        """x W^T + bias [N, out_features] as bitsandbytes' own layers have it: of few rows without expanding the weight,
        where that is quicker on the card, and else in one call."""
        *scales, codes = parts
        size = _BLOCK_SIZE[self.name]
        if not self.double:
            return _MULTIPLY_4BIT(x, codes.view(-1, 1), shape, scales[0], size, self.name, bias)
        mean, nested, codes_of_scales = scales
        code = _dynamic_map(x.device)
        return _MULTIPLY_4BIT(
            x, codes.view(-1, 1), shape, nested, size, self.name, bias, codes_of_scales, code, mean.view(())
        )

    def _absmax(self, scales: list[Tensor]) -> Tensor:
        """The blocks' scales of a nf4 weight, fp32."""
        if not self.double:
            return scales[0]
        mean, nested, codes = scales
        code = _dynamic_map(codes.device)
        return _DEQUANTIZE_8BIT(codes, nested, code, _SCALES_PER_NESTED_BLOCK, torch.float32).add_(mean)


def _is_recomputing() -> bool:
    """Whether this is a forward pass within a backward pass."""
    return torch._C._current_graph_task_id() != -1


_STAND_INS: dict[str, QuantizedLinear] = {}
"""A layer without weights for each `kind`, which computes with the weight that a compiled block hands to it."""


@contextmanager
def _holding(kind: str, storage: Tensor, bias: Tensor | None = None) -> Iterator[QuantizedLinear]:
    layer = _STAND_INS[kind]
    vars(layer).update(weight=storage.detach(), bias=bias)
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
        self.shape = torch.Size((self.out_features, self.in_features))
        dtype, device = linear.weight.dtype, linear.weight.device
        storage = torch.empty(scheme.storage_bytes(self.shape) // dtype.itemsize, dtype=dtype, device=device)
        self.weight = nn.Parameter(storage, requires_grad=False)
        # For counts of parameters; DeepSpeed knows the storage's own length only.
        self.weight.dense_numel = self.shape.numel()  # type: ignore[attr-defined]
        self._parts: tuple[int, tuple[Tensor, ...]] | None = None
        self._expanded: tuple[Tensor, Tensor] | None = None
        """The weight as it is held and in full."""
        self.kind = f"{type(self).__name__}({self.in_features}, {self.out_features}, {scheme})"
        if self.kind not in _STAND_INS:
            _STAND_INS[self.kind] = stand_in = copy.copy(self)
            vars(stand_in).update(_parameters={}, weight=None, bias=None)

    def storage_of(self, weight: Tensor, device: torch.device) -> Tensor:
        """The storage on `device` of a weight that has the shape of the layer whose place this one took."""
        return self.scheme.quantize(weight.t() if self.is_transposed else weight, device, self.weight.dtype)

    def parts(self) -> tuple[Tensor, ...]:
        """Views of the storage, see `Scheme.parts`."""
        weight = self.weight
        if is_sharded(weight) or not isinstance(weight, nn.Parameter):
            # Kept views would keep what ZeRO-3 has gathered.
            return self.scheme.parts(weight, self.shape)
        if self._parts is None or self._parts[0] != weight.data_ptr():
            self._parts = weight.data_ptr(), self.scheme.parts(weight.data, self.shape)
        return self._parts[1]

    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features], expanded anew."""
        return self.scheme.expand(self.parts(), self.shape, self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        output = super().forward(input)
        if self.scheme.keeps_expanded and not input.requires_grad and not torch.compiler.is_compiling():
            self._expanded = None  # no backward pass comes for it
        return output

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b of rows [N, in_features]."""
        if self.scheme.keeps_expanded and _is_recomputing() and isinstance(self.weight, nn.Parameter):
            weight = self.dense_weight()
            self._expanded = self.weight, weight
            return matmul(x, weight.t(), self.bias)
        if self.scheme.multiplies(x):
            return self.scheme.product(x, self.parts(), self.shape, self.bias)
        return super().product(x)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """dL/dx of dL/dy [N, out_features]."""
        kept, self._expanded = self._expanded, None
        if kept is None or kept[0] is not self.weight:
            return super().input_gradient(grad)
        return matmul(grad, kept[1])

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the layer has a storage of its own, or shares this one.
        return vars(self) | {"_parts": None, "_expanded": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        self._parts = None  # or a layer that moves would leave them behind
        return super()._apply(fn, recurse)

    @override
    def traced_product(self, rows: Tensor) -> Tensor:
        return _quantized_product(rows, self.weight, self.bias, self.kind)

    def extra_repr(self) -> str:
        """As `nn.Linear`, with the scheme."""
        return f"{super().extra_repr()}, {self.scheme}"


class Fp8Linear(QuantizedLinear):
    """A frozen linear layer that multiplies 8-bit floats.

        y = q(x) Q^T S + b      dL/dx = q(dL/dy S) Q      W = S Q

    Q is the weight's e4m3, S the diagonal matrix of its rows' scales, q the rounding of a token's row. In dL/dy W the
    scales stand between the factors, in the dimension that is summed over, so dL/dy takes them before it is rounded.
    """

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b of rows [N, in_features]."""
        scales, codes = self.parts()
        return matmul_fp8(x, codes.view(self.shape).t(), scales, self.bias, x.dtype)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """dL/dx of dL/dy [N, out_features]."""
        scales, codes = self.parts()
        ones = _ones(self.in_features, grad.device)
        return matmul_fp8(grad * scales, codes.view(self.shape), ones, None, grad.dtype)


def quantize_linears(backbone: PreTrainedModel, scheme: Scheme) -> dict[str, QuantizedLinear]:
    """Exchange every linear layer but the LM head for a quantised one whose storage is not filled yet.

    State-space mixers (Mamba, with its parameters A and D) keep theirs: they read the weights and do not call the
    layers.

    Returns:
        Name of the weight, as it was, to its new layer.

    Raises:
        UserError: There is no such layer.
    """
    kind = Fp8Linear if scheme.name == "fp8" else QuantizedLinear
    head, replaced = backbone.get_output_embeddings(), {}
    for parent_name, parent in list(backbone.named_modules()):
        if hasattr(parent, "A_log") and hasattr(parent, "D"):
            continue
        for name, child in list(parent.named_children()):
            if is_linear(child) and child is not head:
                layer = kind(child, scheme)
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

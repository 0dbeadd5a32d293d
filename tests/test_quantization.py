"""Quantised layers against bitsandbytes' own and against the bounds of their formats."""

from __future__ import annotations

import copy
import weakref

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from torch import nn

from adept_ds.backbone import quantization
from adept_ds.backbone.quantization import QuantizedLinear, Scheme, quantize_linears

CPU = torch.device("cpu")
SCHEMES = [Scheme("nf4"), Scheme("nf4", double=True), Scheme("int8")]
"""Those whose layers multiply in the model's precision."""


def layers(scheme: Scheme, dtype: torch.dtype, shape: tuple[int, int] = (96, 130)) -> tuple[nn.Linear, QuantizedLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], dtype=dtype).requires_grad_(False)
    quantized = QuantizedLinear(linear, scheme)
    quantized.weight.copy_(scheme.quantize(linear.weight, CPU, dtype))
    return linear, quantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double", [False, True])
# The second is larger than what is quantised at a time, and no multiple of it.
@pytest.mark.parametrize("shape", [(96, 130), (2100, 2048)], ids=str)
def test_nf4_is_that_of_bitsandbytes_to_the_bit(double: bool, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    linear, quantized = layers(Scheme("nf4", double), dtype, shape)
    theirs = bnb.nn.Params4bit(linear.weight.data, False, compress_statistics=double, quant_type="nf4").to("cpu")
    expected = bnb_functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(quantized.dense_weight(), expected)
    assert quantized.dense_weight().dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (33, 96), (9, 160), (5, 48), (7, 33), (8, 128)], ids=str)
def test_nf4_values_are_code_times_absmax_in_any_shape(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Also where blocks run on from row to row, which bitsandbytes' kernels get wrong on processors with AVX-512."""
    linear, quantized = layers(Scheme("nf4"), dtype, shape)
    numel = linear.weight.numel()
    packed, state = bnb_functional.quantize_4bit(linear.weight, blocksize=64, quant_type="nf4")
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:numel].long()
    # One product in fp32 and one rounding, which are the same on every processor.
    values = state.code[codes] * state.absmax.repeat_interleave(64)[:numel]
    assert torch.equal(quantized.dense_weight(), values.view(shape).to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_values_are_off_by_no_more_than_the_format_allows(scheme: Scheme) -> None:
    linear, quantized = layers(scheme, torch.float32)
    # Half the largest gap between neighbouring codes, times the largest absolute value of a block.
    gap = {"nf4": 0.16, "int8": 0.0071}[scheme.name]
    assert float((quantized.dense_weight() - linear.weight).abs().max()) < gap * float(linear.weight.abs().max())


@pytest.mark.parametrize(("scheme", "bits"), list(zip(SCHEMES, [4.5, 4.127, 8.125], strict=True)), ids=str)
def test_bits_a_weight(scheme: Scheme, bits: float) -> None:
    assert 8 * scheme.storage_bytes(torch.Size((4096, 4096))) / 4096**2 == pytest.approx(bits, abs=0.001)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_value_and_gradient_are_those_of_a_linear_layer_on_the_expanded_weight(scheme: Scheme) -> None:
    linear, quantized = layers(scheme, torch.float32)
    linear.weight.data = quantized.dense_weight()
    results = []
    for layer in (quantized, linear):
        torch.manual_seed(1)
        x = torch.randn(3, 5, 130, requires_grad=True)
        y = layer(x)
        y.backward(torch.randn_like(y))
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_the_product_in_one_call_is_that_on_the_expanded_weight(double: bool, bias: bool) -> None:
    """Which a GPU makes; a CPU has the operation too."""
    scheme = Scheme("nf4", double)
    linear = nn.Linear(128, 96, bias=bias).requires_grad_(False)
    quantized = QuantizedLinear(linear, scheme)
    quantized.weight.copy_(scheme.quantize(linear.weight, CPU, torch.float32))
    x = torch.randn(5, 128)
    assert not scheme.multiplies(x)
    torch.testing.assert_close(scheme.product(x, quantized.parts(), quantized.shape, linear.bias), quantized.product(x))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_layer_reads_the_storage_that_it_has_now(scheme: Scheme) -> None:
    """Views of the storage are kept from one pass to the next, but not of another storage."""
    linear, quantized = layers(scheme, torch.float32)
    first = quantized.dense_weight()
    assert quantized.parts()[0].data_ptr() == quantized.parts()[0].data_ptr() == quantized.weight.data_ptr()
    doubled = copy.deepcopy(quantized)
    doubled.weight.copy_(scheme.quantize(2 * linear.weight, CPU, torch.float32))
    torch.testing.assert_close(doubled.dense_weight(), 2 * first)
    assert torch.equal(quantized.dense_weight(), first)
    quantized.weight.data = doubled.weight.data
    assert torch.equal(quantized.dense_weight(), doubled.dense_weight())
    old = weakref.ref(doubled.weight.data.untyped_storage())
    quantized.weight.data = quantized.weight.data.clone()
    quantized.dense_weight()
    doubled.to(torch.float64)
    assert old() is None


def test_a_kept_expansion_is_that_of_the_weight_which_the_layer_has(monkeypatch) -> None:
    monkeypatch.setattr(quantization, "_is_recomputing", lambda: True)
    scheme = Scheme("nf4", keeps_expanded=True)
    linear, quantized = layers(scheme, torch.float32)
    x, grad = torch.randn(4, 130, requires_grad=True), torch.randn(4, 96)
    quantized(x)
    quantized.weight = nn.Parameter(scheme.quantize(2 * linear.weight, CPU, torch.float32), requires_grad=False)
    torch.testing.assert_close(quantized.input_gradient(grad), grad @ quantized.dense_weight())


def test_a_storage_that_zero3_gathers_is_not_held(monkeypatch) -> None:
    _, quantized = layers(Scheme("nf4"), torch.float32)
    quantized.weight.ds_id = 0
    quantized.dense_weight()
    gathered = weakref.ref(quantized.weight.data.untyped_storage())
    quantized.weight.data = torch.empty(0)
    assert gathered() is None


def test_nothing_is_saved_for_the_backward_pass() -> None:
    _, quantized = layers(Scheme("nf4"), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        quantized(torch.randn(4, 130, requires_grad=True))
    assert saved == []


@pytest.mark.parametrize("name", ["llama", "codegen", "t5-tied"])
def test_every_linear_layer_but_the_head_is_exchanged(make_backbone, name: str) -> None:
    backbone = make_backbone(name)
    linears = {f"{key}.weight" for key, module in backbone.named_modules() if type(module) is nn.Linear}
    replaced = quantize_linears(backbone, Scheme("nf4"))
    assert replaced.keys() == linears - {"lm_head.weight"}
    assert type(backbone.get_output_embeddings()) is nn.Linear
    left = {key for key, module in backbone.named_modules() if type(module) is nn.Linear}
    assert left == {"lm_head"}

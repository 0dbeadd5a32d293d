"""Linear layers that keep no input."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adept_ds.backbone import frozen_linear
from adept_ds.backbone.frozen_linear import FrozenLinear, replace_frozen_linears
from adept_ds.backbone.quantization import QuantizedLinear, Scheme
from adept_ds.model.loss import LossHead


def layers(bias: bool, dtype: torch.dtype) -> tuple[nn.Linear, FrozenLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias, dtype=dtype).requires_grad_(False)
    return linear, FrozenLinear(linear)


def value_and_gradient(layer: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(3, 5, 64, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("fast_bf16", [True, False], ids=["", "widened"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_input_gradient_are_those_of_linear(monkeypatch, dtype, bias, fast_bf16):
    monkeypatch.setattr(frozen_linear, "has_fast_bf16", lambda: fast_bf16)
    linear, frozen = layers(bias, dtype)
    for actual, expected in zip(value_and_gradient(frozen, dtype), value_and_gradient(linear, dtype), strict=True):
        assert actual.dtype == dtype
        # Of the 64 terms, summed in fp32; in bf16 then of the sum.
        roundings = 64 if dtype == torch.float32 else 1
        tolerance = roundings * torch.finfo(dtype).eps * float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def conv1d(linear: nn.Linear) -> Conv1D:
    """The same function with the weight the other way round."""
    layer = Conv1D(linear.out_features, linear.in_features).to(linear.weight.dtype).requires_grad_(False)
    layer.weight.copy_(linear.weight.t())
    layer.bias.copy_(linear.bias)
    return layer


def quantized(linear: nn.Linear) -> QuantizedLinear:
    """In 8 bits; `linear` gets the values that are left."""
    layer = QuantizedLinear(linear, Scheme("int8"))
    layer.weight.copy_(layer.storage_of(linear.weight, torch.device("cpu")))
    linear.weight.copy_(layer.dense_weight())
    return layer


@pytest.mark.parametrize("fast_bf16", [True, False], ids=["", "widened"])
@pytest.mark.parametrize("make", [FrozenLinear, lambda linear: FrozenLinear(conv1d(linear)), quantized, LossHead])
def test_a_bias_is_added_before_the_product_is_rounded(monkeypatch, make, fast_bf16):
    monkeypatch.setattr(frozen_linear, "has_fast_bf16", lambda: fast_bf16)
    linear, _ = layers(True, torch.bfloat16)
    linear.bias.normal_()
    layer, x = make(linear), torch.randn(3, 50, 64, dtype=torch.bfloat16)
    exact = x.double() @ linear.weight.double().t() + linear.bias.double()
    # Rounded twice, a quarter of the values would be others.
    assert float((layer(x) == exact.bfloat16()).double().mean()) > 0.999


@pytest.mark.skipif(not frozen_linear.has_fast_bf16(), reason="torch adds the bias to a rounded product here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [lambda linear: linear, conv1d], ids=["linear", "conv1d"])
def test_values_are_those_of_the_layer_to_the_bit(make, dtype):
    layer = make(layers(True, dtype)[0])
    x = torch.randn(3, 50, 64, dtype=dtype)
    assert torch.equal(FrozenLinear(layer)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_saved_for_the_backward_pass(dtype):
    _, frozen = layers(True, dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes), lambda tensor: tensor):
        frozen(torch.randn(3, 5, 64, dtype=dtype, requires_grad=True))
    assert saved == []


def test_what_it_returns_may_be_added_to_in_place():
    _, frozen = layers(True, torch.float32)
    x = torch.randn(3, 5, 64, requires_grad=True)
    y = frozen(x)
    y += x[..., :48]
    y.sum().backward()
    expected = frozen.weight.sum(0) + torch.cat([torch.ones(48), torch.zeros(16)])
    torch.testing.assert_close(x.grad, expected.expand(3, 5, 64))


def test_a_slice_of_the_input_does_not_make_copies_of_the_weight():
    _, frozen = layers(False, torch.float32)
    last = torch.randn(7, 5, 64)[:, -1:]
    with torch.profiler.profile(profile_memory=True) as profile:
        frozen(last)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.events()) < 2 * 7 * 64 * 4


def test_parameters_are_shared():
    linear, frozen = layers(True, torch.float32)
    assert frozen.weight is linear.weight
    assert frozen.bias is linear.bias


def test_only_plain_frozen_layers_are_replaced():
    class Special(nn.Linear):
        pass

    trained_bias = nn.Linear(4, 4).requires_grad_(False)
    trained_bias.bias.requires_grad_(True)
    model = nn.ModuleDict(
        {
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "nested": nn.Sequential(nn.Linear(4, 4, bias=False).requires_grad_(False)),
            "conv1d": Conv1D(4, 4).requires_grad_(False),
            "trained": nn.Linear(4, 4),
            "trained_bias": trained_bias,
            "subclass": Special(4, 4).requires_grad_(False),
        }
    )
    assert replace_frozen_linears(model) == 3
    assert type(model["frozen"]) is type(model["nested"][0]) is type(model["conv1d"]) is FrozenLinear
    assert type(model["trained"]) is type(model["trained_bias"]) is nn.Linear
    assert type(model["subclass"]) is Special

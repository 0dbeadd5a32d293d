"""Linear layers that keep no input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adept_ds.backbone import frozen_linear
from adept_ds.backbone.frozen_linear import FrozenLinear, replace_frozen_linears


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
        # Of the 64 terms, summed in fp32; in bf16 then of the sum, here once and there once more with the bias.
        roundings = 64 if dtype == torch.float32 else 2
        tolerance = roundings * torch.finfo(dtype).eps * float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_saved_for_the_backward_pass(dtype):
    _, frozen = layers(True, dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes), lambda tensor: tensor):
        frozen(torch.randn(3, 5, 64, dtype=dtype, requires_grad=True))
    assert saved == []


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
            "trained": nn.Linear(4, 4),
            "trained_bias": trained_bias,
            "subclass": Special(4, 4).requires_grad_(False),
        }
    )
    assert replace_frozen_linears(model) == 2
    assert type(model["frozen"]) is type(model["nested"][0]) is FrozenLinear
    assert type(model["trained"]) is type(model["trained_bias"]) is nn.Linear
    assert type(model["subclass"]) is Special

"""8-bit floats: the rounding, both ways of multiplying, and layers against the exact product of the rounded values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from adept_ds.backbone import fp8
from adept_ds.backbone.fp8 import E4M3, matmul_fp8, round_rows
from adept_ds.backbone.quantization import Fp8Linear, Scheme

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(dtype: torch.dtype, inputs: int = 48, outputs: int = 80) -> tuple[nn.Linear, Fp8Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
    # Rows of very different sizes, and one of zeros.
    linear.weight.mul_(torch.logspace(-3, 1, outputs)[:, None])
    linear.weight[3] = 0
    quantized = Fp8Linear(linear, Scheme("fp8"))
    quantized.weight.copy_(quantized.storage_of(linear.weight, CPU))
    return linear, quantized


def rounded(x: Tensor) -> Tensor:
    """Each row in e4m3 and back, exactly."""
    scales = x.float().abs().amax(-1, keepdim=True) / 448
    return (x.float() / scales).to(E4M3).double() * scales.double()


def test_a_row_is_off_by_no_more_than_e4m3_allows() -> None:
    x = torch.randn(50, 300) * torch.logspace(-30, 30, 50)[:, None]
    codes, scales = round_rows(x)
    # Half the last of three bits behind the leading one; what is below the normal numbers is off by half the least.
    bound = torch.maximum(x.abs() / 16, scales * 2.0**-10)
    assert bool(((codes.double() * scales.double() - x.double()).abs() <= bound * (1 + 1e-6)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_finite_row_leaves_the_range(dtype: torch.dtype) -> None:
    largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    x = torch.tensor([[0, 0, 0], [least, 0, -least], [largest, 1, -largest], [largest, largest, 0]], dtype=dtype)
    codes, scales = round_rows(x)
    assert bool(codes.float().isfinite().all())
    assert bool(scales.isfinite().all())
    assert codes[0].float().tolist() == [0, 0, 0]
    assert codes[2].float().tolist() == [448, 0 if largest > 1e5 else pytest.approx(448 / largest, abs=2**-9), -448]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_has_gone_wrong_in_a_row_is_seen_in_that_row_alone(value: float) -> None:
    _, quantized = layer(torch.float32)
    x = torch.randn(4, 48)
    x[2, 5] = value
    wrong = quantized(x).isnan().any(-1)
    assert wrong.tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient_are_the_products_of_the_rounded_factors(dtype: torch.dtype) -> None:
    linear, quantized = layer(dtype)
    codes = (linear.weight.float() / (linear.weight.float().abs().amax(1, keepdim=True) / 448)).to(E4M3)
    codes[3] = 0
    scales = linear.weight.float().abs().amax(1) / 448
    x, grad = torch.randn(3, 5, 48, dtype=dtype, requires_grad=True), torch.randn(3, 5, 80, dtype=dtype)
    y = quantized(x)
    y.backward(grad)
    assert y.dtype == x.grad.dtype == dtype
    expected = rounded(x.detach()) @ (codes.double() * scales.double()[:, None]).t() + linear.bias.double()
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-4 if dtype == torch.float32 else 1e-2}
    torch.testing.assert_close(y.double(), expected, **tolerance)
    # The scales of the rows stand in the dimension that the backward pass sums over: the gradient takes them.
    torch.testing.assert_close(x.grad.double(), rounded(grad.float() * scales) @ codes.double(), **tolerance)


def test_the_gradient_is_near_the_exact_one() -> None:
    linear, quantized = layer(torch.float32)
    x, grad = torch.randn(64, 48, requires_grad=True), torch.randn(64, 80)
    quantized(x).backward(grad)
    exact = grad @ linear.weight
    assert float((x.grad - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("rows", [0, 1, 7, 32])
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 80), (33, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_mm_is_the_emulation(monkeypatch, rows: int, inputs: int, outputs: int, bias: bool) -> None:
    """torch multiplies 8-bit floats on a CPU too, which shows that the call is the right one; sizes that it is not made
    for and empty batches must not get there."""
    calls = []
    own = torch._scaled_mm

    def counted(*args, **options) -> Tensor:
        calls.append(args)
        assert args[1].stride(0) == 1
        return own(*args, **options)

    monkeypatch.setattr(torch, "_scaled_mm", counted)
    torch.manual_seed(1)
    x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).to(E4M3)
    scales, values = torch.rand(outputs), torch.randn(outputs).bfloat16() if bias else None
    for b, t in [(weight.t(), scales), (weight.t().contiguous(), scales)]:
        results = []
        for multiplies in (True, False):
            monkeypatch.setattr(fp8, "multiplies_fp8", lambda _, made=multiplies: made)
            results.append(matmul_fp8(x, b, t, values, torch.bfloat16))
        torch.testing.assert_close(*results, rtol=2**-7, atol=1e-2)
    assert len(calls) == (2 if rows and inputs % 16 == 0 else 0)


def test_half_of_bf16s_memory() -> None:
    assert Scheme("fp8").storage_bytes(torch.Size((4096, 14336))) / (4096 * 14336 * 2) == pytest.approx(0.5, abs=1e-3)


def test_the_weight_is_the_same_however_it_is_split_for_rounding(monkeypatch) -> None:
    from adept_ds.backbone import quantization

    weight = torch.randn(37, 50)
    whole = Scheme("fp8").quantize(weight, CPU, torch.float32)
    monkeypatch.setattr(quantization, "_PART_ELEMENTS", 120)
    assert torch.equal(whole.view(torch.uint8), Scheme("fp8").quantize(weight, CPU, torch.float32).view(torch.uint8))


def test_it_says_what_is_known_of_its_speed(monkeypatch) -> None:
    assert "emulated in fp32 here, which is slow" in fp8.speed_note(CPU, torch.bfloat16)
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda _: True)
    assert (
        fp8.speed_note(CPU, torch.bfloat16) == "model.quantization is fp8, whose speed on a GPU has not been measured"
    )
    assert "made for bf16, " in fp8.speed_note(CPU, torch.float32)

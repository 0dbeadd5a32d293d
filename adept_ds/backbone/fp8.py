"""Products of 8-bit floats: rows and columns have a scale each, terms are summed in fp32, the result is rounded once.

    y[i, j] = s[i] t[j] sum_k a[i, k] b[k, j] + c[j]

All values are e4m3. Those of `a` are made here, of the rows of a matrix x: s[i] = max_k |x[i, k]| / 448, the type's
largest value. A finite row never leaves the range, however far its largest value stands out. A row with an infinity or
NaN comes out as NaN, so that what has gone wrong is seen, as the dynamic loss scale of fp16 must see it.

Gradients are e4m3 too. e5m2, the usual type for them, has more range, which a scale for each row makes unnecessary, and
half the precision: on SmolLM2-135M it alone changed the adapter's gradient by 18 to 26 %, e4m3 by 7 to 13 %.

NVIDIA's cards of compute capability 8.9 and up multiply so by themselves, into bf16. Elsewhere, for other precisions
and for sizes that are no multiples of 16, the same 8-bit values are multiplied in fp32, which is slow.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
_UNIT = 16
"""Both sizes of `b` are multiples of it where the card multiplies."""


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit floats with a scale for each row and column; tried once."""
    if device.type != "cuda":
        return False
    codes = torch.ones(_UNIT, _UNIT, device=device).to(E4M3)
    ones = torch.ones(_UNIT, 1, device=device)
    try:
        product = torch._scaled_mm(codes, codes.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16)
    except RuntimeError:  # how torch says that the card or the build cannot
        return False
    return bool((product == _UNIT).all())


def speed_note(device: torch.device, dtype: torch.dtype) -> str:
    """Say what is known of the speed of fp8 layers of a model in `dtype` on `device`."""
    if multiplies_fp8(device) and dtype == torch.bfloat16:
        return "model.quantization is fp8, whose speed on a GPU has not been measured"
    where = "bf16" if multiplies_fp8(device) else "GPUs of compute capability 8.9 and up"
    return (
        "model.quantization is fp8, whose products are emulated in fp32 here, which is slow: they are made for "
        f"{where}, where their speed has not been measured"
    )


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [N, n] / s in e4m3, row behind row, and s [N, 1] in fp32."""
    largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True, dtype=torch.float32)
    # A row of zeros has a scale too, by which it stays zero.
    scales = (largest / torch.finfo(E4M3).max).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scales).to(E4M3).contiguous(), scales


def matmul_fp8(x: Tensor, b: Tensor, t: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product above.

    Args:
        x: [N, n], rounded here.
        b: [n, m] in e4m3. Where the card multiplies, it is copied unless each column's values are consecutive, which is
            how Hopper's kernels read it.
        t: [m] in fp32.
        bias: [m].
        dtype: Of the result [N, m].
    """
    a, s = round_rows(x)
    if multiplies_fp8(x.device) and dtype == torch.bfloat16 and len(x) and not any(size % _UNIT for size in b.shape):
        by_columns = b if b.stride(0) == 1 else b.t().contiguous().t()
        return torch._scaled_mm(a, by_columns, scale_a=s, scale_b=t[None], bias=bias, out_dtype=dtype)
    y = (a.float() @ b.float()).mul_(s).mul_(t)
    return (y if bias is None else y.add_(bias)).to(dtype)

"""How far apart numbers may lie that are one number in exact arithmetic, on any processor."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = 1024
"""Of a pass through a small model of `tests.models`: some ten sums in a row, each of up to 99 terms and roundings."""


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor, largest: float | None = None) -> None:
    """Compare two computations of the same sums, whose order the processor and the shapes of the operands choose.

    Every element may be off by `ROUNDINGS` roundings of the largest element, not of itself: terms cancel one another.
    `largest` stands for that element where `expected` is a part of what is computed together.
    """
    if largest is None:
        largest = float(expected.detach().abs().max())
    tolerance = ROUNDINGS * torch.finfo(expected.dtype).eps * largest
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)

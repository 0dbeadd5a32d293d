"""Full values of parameters that ZeRO-3 may have split over the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 owns this parameter; its local shape is then 0 outside a gather."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The parameter's shape as the model declared it, sharded or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: Tensor) -> int:
    """The parameter's number of elements as the model declared it, sharded or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Hold the parameters' full values on every rank inside the block, read-only. All ranks must enter together."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield

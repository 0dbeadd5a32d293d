"""Full values of parameters that ZeRO-3 may have split over the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 owns this parameter; its local shape is then 0 outside a gather."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape as the model declared it, sharded or not."""
    return tuple(parameter.ds_shape) if is_sharded(parameter) else tuple(parameter.shape)


def full_numel(parameter: nn.Parameter) -> int:
    """The parameter's number of elements as the model declared it, sharded or not."""
    return parameter.ds_numel if is_sharded(parameter) else parameter.numel()


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Hold the parameters' full values on every rank inside the block, read-only. All ranks must enter together."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield

"""Where the time of a step goes, by what is computed: forward and backward together, from a profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedModel

from adept_ds.benchmark.contenders import Contender

LINEAR, ATTENTION, HEAD, OPTIMIZER, OTHER = "linear layers", "attention", "loss head", "optimizer", "other"
ELEMENTWISE, EMBEDDING = "norm, activation, rotary, mask", "embedding and offset"
GROUPS = (LINEAR, ATTENTION, ELEMENTWISE, EMBEDDING, HEAD, OPTIMIZER, OTHER)
"""Parts of a training step, forward and backward together."""

ATTENTION_OPERATORS = {"aten::scaled_dot_product_attention", "aten::matmul", "aten::bmm", "aten::softmax"}
"""Outside the linear layers and the head, products and softmax are the attention's."""

BACKBONE = "backbone"
BACKWARD = "autograd::engine::evaluate_function: "


def operator_seconds(contender: Contender, device: torch.device) -> dict[str, float]:
    """Return the mean seconds of a step by `GROUPS`, from a profile of one pass over the batches.

    On a GPU these are the seconds of its kernels. The profiler's own cost is in the figures.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _named_ranges(contender.backbone), profile(activities=activities) as profiler:
        for number in range(len(contender.steps)):
            contender.forward_backward(number)
            contender.update()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    groups = event_groups(events)
    total = dict.fromkeys(GROUPS, 0.0)
    for event, group in zip(events, groups, strict=True):
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        total[group] += own / 1e6 / len(contender.steps)
    return total


@contextmanager
def _named_ranges(backbone: PreTrainedModel) -> Iterator[None]:
    """Record the forward pass of the parts that are modules under the names of their groups."""
    names: dict[nn.Module, str] = {m: LINEAR for m in backbone.modules() if isinstance(m, nn.Linear)}
    reader = backbone.get_encoder() if backbone.config.is_encoder_decoder else backbone
    names |= {backbone: BACKBONE, reader.get_input_embeddings(): EMBEDDING, backbone.get_output_embeddings(): HEAD}
    open_ranges: list[record_function] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_ranges.append(record_function(name))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    handles = []
    for module, name in names.items():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def event_groups(events: Sequence[FunctionEvent]) -> list[str]:
    """Return the group of each event: that of the range or operator around it, in the backward pass that of the
    forward operator that its node belongs to."""
    # A node has the number of the operator that made it. An operator that made none shows the number of the next node,
    # so the last operator with a number is the one.
    maker_of: dict[int, str] = {}
    groups = [OTHER] * len(events)
    for i in sorted(range(len(events)), key=lambda i: events[i].time_range.start):
        lineage = list(_with_ancestors(events[i]))
        node = next((event for event in lineage if event.name.startswith(BACKWARD)), None)
        if node is None:
            groups[i] = _forward_group([event.name for event in lineage])
            maker_of[events[i].sequence_nr] = groups[i]
        elif node.sequence_nr >= 0:
            groups[i] = maker_of[node.sequence_nr]
    return groups


def _with_ancestors(event: FunctionEvent | None) -> Iterator[FunctionEvent]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _forward_group(lineage: Sequence[str]) -> str:
    """Group of an operator outside the backward pass; `lineage` is its name and those of all around it."""
    named = next((name for name in lineage if name in GROUPS), None)
    if named is not None:
        return named
    if ATTENTION_OPERATORS.intersection(lineage):
        return ATTENTION
    if any(name.startswith("Optimizer.") for name in lineage):
        return OPTIMIZER
    return ELEMENTWISE if BACKBONE in lineage else OTHER

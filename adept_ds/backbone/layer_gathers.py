"""Gathers of frozen weights a layer at a time, in place of ZeRO-3's own, which are weight by weight.

DeepSpeed keeps a hook for every module, a state for every weight and an order of all of them, most of which is for
weights that are trained. A frozen weight is only gathered and dropped. So the frozen weights of a decoder or encoder
layer are one unit here: one collective brings all of them before the layer's forward and backward pass, and begins when
the layer before it does. Nothing is inside a layer's `forward`: the two hooks are on the layer itself.

The weights stay DeepSpeed's parameters in everything else: their parts, offloading, checkpoints.

Whole weights lie in one storage of the layer, which is emptied when they are dropped and filled again in its place.
What autograd has saved, be it a weight or a view of it, therefore holds no memory and sees the values again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adept_ds.backbone.blocks import backbone_layers

ALIGNMENT = 128
"""Bytes at a multiple of which a weight begins in its layer's storage."""


def frozen_layers(model: nn.Module, backbone: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    """Layers of `backbone` to the parameters that can be gathered with them: frozen ones that nothing outside the layer
    has, and no module that has trained ones too, which DeepSpeed gathers along with those."""
    places = Counter(parameter for module in model.modules() for parameter in module._parameters.values())
    beside_trained: set[nn.Parameter] = set()
    for module in model.modules():
        own = list(fetched_with(module))
        if any(parameter.requires_grad for parameter in own):
            beside_trained.update(own)
    found: dict[nn.Module, list[nn.Parameter]] = {}
    for layer in dict.fromkeys(backbone_layers(backbone)):
        here = Counter(parameter for module in layer.modules() for parameter in module._parameters.values())
        own = [parameter for parameter in layer.parameters() if here[parameter] == places[parameter]]
        if own := [parameter for parameter in own if parameter not in beside_trained]:
            found[layer] = own
    return found


def fetched_with(module: nn.Module) -> Iterator[nn.Parameter]:
    """What DeepSpeed's hooks of a module gather: its own parameters, of a leaf in DeepSpeed's sense all below it."""
    return module.parameters(recurse=getattr(module, "_z3_leaf", False))


def modules_by_layer(layers: Mapping[nn.Module, Iterable[nn.Parameter]]) -> list[nn.Module]:
    """The modules within the layers for which DeepSpeed has nothing to gather: all that they have comes with their
    layer."""
    taken = {parameter for own in layers.values() for parameter in own}
    return [module for layer in layers for module in layer.modules() if taken.issuperset(fetched_with(module))]


def starts_in_storage(sizes: Sequence[int]) -> list[int]:
    """Where weights of these sizes in bytes begin in their layer's storage, and its length as one more."""
    return list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))


def layer_ahead(index: int, count: int, is_backward: bool) -> int:
    """Which of `count` layers is at work after layer `index`; the last one is the first of the backward pass too."""
    return max(index - 1, 0) if is_backward else min(index + 1, count - 1)


class LayerGathers:
    """Keeps the frozen weights of the layer that is at work whole, and gathers those of the next one meanwhile.

    Every rank must call the same layers in the same order, as ZeRO-3 requires anyway.

    Args:
        layers: From `frozen_layers`; all parameters are split by ZeRO-3, and not offloaded to a disk.
        device: Where they are used.
    """

    def __init__(self, layers: Mapping[nn.Module, Sequence[nn.Parameter]], device: torch.device) -> None:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._units = [_Unit(parameters, device, stream) for parameters in layers.values()]
        self._whole: set[int] = set()
        """Units that are whole, or on their way."""
        for index, layer in enumerate(layers):
            self._hook(layer, index)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self._units)

    def _hook(self, layer: nn.Module, index: int) -> None:
        def before(*_: Any) -> None:
            self.enter(index)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            # The hidden states, which every layer returns first, tell when its backward pass begins.
            hidden = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            if hidden.requires_grad:
                hidden.register_hook(before)

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    def enter(self, index: int) -> None:
        """Make layer `index` whole, begin with the next one, and drop all others."""
        ahead = layer_ahead(index, len(self._units), is_backward=torch._C._current_graph_task_id() != -1)
        for other in self._whole - {index, ahead}:
            self._drop(other)
        for wanted in (index, ahead):
            if wanted not in self._whole:
                self._units[wanted].gather()
                self._whole.add(wanted)
            if wanted == index:
                self._units[index].wait()

    def drop(self) -> None:
        """Drop all layers."""
        for index in list(self._whole):
            self._drop(index)

    def _drop(self, index: int) -> None:
        self._units[index].drop()
        self._whole.remove(index)


class _Unit:
    """The frozen weights of one layer."""

    def __init__(self, parameters: Sequence[Any], device: torch.device, stream: torch.cuda.Stream | None) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self._status = ZeroParamStatus
        self._parameters, self._device, self._stream = parameters, device, stream
        self._group = parameters[0].ds_process_group
        self._ranks = dist.get_world_size(self._group)
        self._pending: list[Any] = []
        """A collective under way and what it reads."""
        self._copied: torch.cuda.Event | None = None
        parts = [parameter.ds_tensor for parameter in parameters]
        self._empty = [torch.empty(0, dtype=part.dtype, device=device) for part in parts]
        if self._ranks == 1 and all(part.device.type == device.type for part in parts):
            self._storage = None  # a part is the whole weight
            wholes = list(parts)
        else:
            sizes = [part.numel() * part.itemsize * self._ranks for part in parts]
            *starts, self._nbytes = starts_in_storage(sizes)
            buffer = torch.empty(self._nbytes, dtype=torch.uint8, device=device)
            self._storage = buffer.untyped_storage()
            self._bytes = [buffer[start : start + size] for start, size in zip(starts, sizes, strict=True)]
            wholes = [flat.view(part.dtype) for flat, part in zip(self._bytes, parts, strict=True)]
        self._values = [
            whole[: parameter.ds_numel].view(parameter.ds_shape)
            for whole, parameter in zip(wholes, parameters, strict=True)
        ]
        if self._storage is not None:
            self._storage.resize_(0)

    def gather(self) -> None:
        """Begin to make the weights whole."""
        if self._storage is not None:
            self._storage.resize_(self._nbytes)
            if self._stream is not None:
                # Memory is taken in the order of the compute stream, in which it was given back.
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with self._on_stream():
                parts = [parameter.ds_tensor.data.view(torch.uint8) for parameter in self._parameters]
                if self._ranks == 1:
                    for flat, part in zip(self._bytes, parts, strict=True):
                        flat.copy_(part, non_blocking=True)
                else:
                    parts = [part.to(self._device, non_blocking=True) for part in parts]
                    self._pending = [self._group.allgather_into_tensor_coalesced(self._bytes, parts), parts]
            if self._stream is not None:
                self._copied = self._stream.record_event()

    def wait(self) -> None:
        """Let what follows see the whole weights, which may have been split again by DeepSpeed."""
        if self._pending:
            self._pending[0].wait()
            self._pending = []
        if self._copied is not None:
            # Not the whole stream, which may be at the next layer already.
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._copied = None
        available = self._status.AVAILABLE
        for parameter, value in zip(self._parameters, self._values, strict=True):
            if parameter.ds_status is not available:
                parameter.data = value
                parameter.ds_status = available

    def drop(self) -> None:
        """Keep this rank's parts alone."""
        if self._pending or self._copied is not None:
            self.wait()
        for parameter, empty in zip(self._parameters, self._empty, strict=True):
            parameter.data = empty
            parameter.ds_status = self._status.NOT_AVAILABLE
        if self._storage is not None:
            self._storage.resize_(0)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

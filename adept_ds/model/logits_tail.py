"""What a backbone does to its logits behind the LM head: a scale, a soft cap, a bias.

    Gemma 2      c tanh(z / c)           Granite      z / s
    Cohere       s z                     BART         z + b

The loss head computes the loss where the logits are, a chunk of rows at a time, so it has to do the same to each chunk.
No architecture is known here: the backbone's own forward is run once behind stand-ins for its layers, and what torch
functions it calls on the head's output is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from adept_ds.backbone.sharding import full_shape
from adept_ds.contexts import attribute_set

_SAME_VALUES = {Tensor.float, Tensor.to, Tensor.contiguous, Tensor.detach, Tensor.clone, Tensor.type_as}
"""They change no value; the loss is computed in fp32 throughout."""


class _Logits:
    """Stands for the logits among recorded arguments."""


@dataclass(frozen=True)
class _Named:
    """Stands for a parameter or buffer of the backbone among recorded arguments: it may be moved later."""

    name: str


@dataclass(frozen=True)
class _Step:
    function: Callable[..., Tensor]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


class LogitsTail:
    """What `backbone` does to logits; called with logits [N, V], it returns those that the backbone returns [N, V]."""

    def __init__(self, backbone: nn.Module, steps: Sequence[_Step]) -> None:
        self._backbone, self._steps = backbone, steps
        self._functions = {step.function for step in steps}

    def __bool__(self) -> bool:
        """Whether it does anything."""
        return bool(self._steps)

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply it."""
        # In the shape that the steps were recorded with, and not in place of what a gradient is asked for.
        values = logits[:, None].clone()

        def filled(argument: Any) -> Any:
            if isinstance(argument, _Logits):
                return values
            if isinstance(argument, _Named):
                parent, _, name = argument.name.rpartition(".")
                return getattr(self._backbone.get_submodule(parent), name)
            return argument.to(logits.device) if isinstance(argument, Tensor) else argument

        for step in self._steps:
            values = step.function(*tree_map(filled, step.args), **tree_map(filled, step.kwargs))
        return values[:, 0].float()

    def left_out_for(self, stand_in: Callable[[], Tensor | None]) -> TorchFunctionMode:
        """Mode in which the backbone's steps leave the tensor untouched that `stand_in` returns, if it returns one."""
        return _LeftOut(self._functions, stand_in)


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same storage, on the meta device too."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


class _LeftOut(TorchFunctionMode):
    def __init__(self, functions: set[Callable[..., Tensor]], stand_in: Callable[[], Tensor | None]) -> None:
        super().__init__()
        self._functions, self._stand_in = functions, stand_in

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        untouched = self._stand_in() if func in self._functions else None
        if untouched is not None:
            for argument in tree_leaves((args, kwargs)):
                # By memory: hooks wrap outputs in new tensors of the same storage.
                if isinstance(argument, Tensor) and shares_memory(argument, untouched):
                    return argument
        return func(*args, **(kwargs or {}))


class _Recorder(TorchFunctionMode):
    """Notes the functions that are called on `current`, and on what comes out of them."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        named = [*backbone.named_parameters(), *backbone.named_buffers()]
        self._names = {id(tensor): name for name, tensor in named}
        self.current: Tensor | None = None
        self.steps: list[_Step] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        if isinstance(result, Tensor) and any(leaf is self.current for leaf in leaves if isinstance(leaf, Tensor)):
            if func not in _SAME_VALUES:
                self.steps.append(_Step(func, tree_map(self._noted, args), tree_map(self._noted, kwargs)))
            self.current = result
        return result

    def _noted(self, argument: Any) -> Any:
        if argument is self.current:
            return _Logits()
        return _Named(self._names[id(argument)]) if id(argument) in self._names else argument


class _Stub(tuple[Tensor, ...]):
    """What a stand-in for layers returns: hidden states, and nothing of all else that may be asked for."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


@torch.no_grad()
def trace_tail(backbone: Any) -> LogitsTail | None:
    """Find out what a backbone does to its logits; None if that cannot be seen, or if it is more than logits in, logits
    out. Computes nothing of its layers, and reads no weight: they may be sharded, or on the meta device."""
    head = backbone.get_output_embeddings()
    rows, width = full_shape(head.weight)
    hidden = torch.zeros(1, 1, width, dtype=head.weight.dtype, device=head.weight.device)
    ids = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if backbone.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    recorder = _Recorder(backbone)

    def logits(*args: Any, **kwargs: Any) -> Tensor:
        recorder.current = hidden.new_zeros(1, 1, rows)
        return recorder.current

    with ExitStack() as stack:
        for child in backbone.children():
            if head not in child.modules():  # it may be in a module that does more
                stack.enter_context(attribute_set(child, "forward", lambda *args, **kwargs: _Stub((hidden,))))
        stack.enter_context(attribute_set(head, "forward", logits))
        stack.enter_context(recorder)
        try:
            output = backbone(**inputs).logits
        except Exception:  # an architecture that looks at more of its layers than their states
            return None
    if not isinstance(output, Tensor) or output is not recorder.current or output.shape != (1, 1, rows):
        return None
    return LogitsTail(backbone, recorder.steps)


@contextmanager
def untouched(tail: LogitsTail | None, stand_in: Callable[[], Tensor | None]) -> Iterator[None]:
    """Within the block the backbone leaves alone what its head returns in place of logits; see `left_out_for`."""
    if not tail:
        yield
        return
    with tail.left_out_for(stand_in):
        yield

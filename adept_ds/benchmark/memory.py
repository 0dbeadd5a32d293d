"""Peak memory of a training step on GPU and CPU, by one definition, for models that share their weights.

    held     bytes of the contender's own parameters, buffers and optimizer states between steps
    step     growth of live tensor bytes from a step's beginning to its peak: activations, logits, gradients, weights
             that are gathered or expanded for use
    peak     held + step

On a GPU the growth is torch.cuda.max_memory_allocated over memory_allocated before the step; on a CPU it is what
torch's allocator reports to the profiler, so memory that libraries take from the system themselves is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from adept_ds.backbone.sharding import is_sharded


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of all tensors that are held between steps, memory that several share counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _held(model)}
    if optimizer:
        for tensor in _optimizer_tensors(optimizer):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _held(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        # ZeRO-3 keeps this rank's part beside the parameter, bitsandbytes its scales.
        yield parameter.ds_tensor if is_sharded(parameter) else parameter  # type: ignore[attr-defined]
        state = parameter.quant_state if isinstance(parameter, Params4bit) else None
        while state is not None:
            yield from (value for value in vars(state).values() if isinstance(value, Tensor))
            state = state.state2
    yield from model.buffers()


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def step_growth(step: Callable[[], object], device: torch.device) -> int:
    """Run `step` and return by how many bytes the live tensors grow at its peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak

"""Where the time of a step goes: gather, forward, loss, backward, step, which together are the whole step.

    gather      waiting for weights that ZeRO-3 has split, and starting to fetch the next ones
    forward     embedding and layers of the backbone, up to the LM head
    loss        LM head and loss; `adept_ds` computes the gradient behind the head here too, stock models in backward
    backward    the rest of the gradients; with activation checkpointing the layers once more
    step        the optimizer

On a GPU the times are those of the compute stream: what is fetched while it computes is not waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

GATHER, FORWARD, LOSS, BACKWARD, STEP = PHASES = ("gather", "forward", "loss", "backward", "step")


class PhaseClock:
    """Adds up the time between switches from one phase to the next.

    On a GPU it is the device's time, on a CPU the wall's, or with `cpu_seconds` this process's own, of all threads.
    """

    def __init__(self, device: torch.device, cpu_seconds: bool = False) -> None:
        self.device = device
        self._seconds = time.process_time if cpu_seconds else time.perf_counter
        self._marks: list[tuple[str, Any]] = []

    def switch(self, phase: str) -> str:
        """Begin `phase`; return the one that ends here."""
        previous = self._marks[-1][0] if self._marks else phase
        self._marks.append((phase, self._now()))
        return previous

    def stop(self) -> dict[str, float]:
        """End the last phase, wait for the device, return the seconds of every phase and start anew."""
        self.switch(STEP)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in pairwise(self._marks):
            seconds[phase] += start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
        self._marks.clear()
        return seconds

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return self._seconds()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def clocked(
    clock: PhaseClock, model: nn.Module, head: nn.Module, fetches: Sequence[tuple[Any, str]] = ()
) -> Iterator[None]:
    """Switch the clock's phases where `model` is called, where its LM `head` is, and where it returns.

    Args:
        clock: The clock. The optimizer's step is the caller's to switch to.
        model: What the loss comes from.
        head: The LM head in it.
        fetches: Objects and names of their methods that fetch weights before they are used.
    """

    def switch_to(phase: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            clock.switch(phase)

        return hook

    def timed(original: Callable[..., None]) -> Callable[..., None]:
        def fetch(*arguments: Any, **options: Any) -> None:
            phase = clock.switch(GATHER)
            original(*arguments, **options)
            clock.switch(phase)

        return fetch

    handles = [
        model.register_forward_pre_hook(switch_to(FORWARD)),
        head.register_forward_pre_hook(switch_to(LOSS)),
        model.register_forward_hook(switch_to(BACKWARD)),
    ]
    for owner, name in fetches:
        setattr(owner, name, timed(getattr(owner, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for owner, name in fetches:
            delattr(owner, name)

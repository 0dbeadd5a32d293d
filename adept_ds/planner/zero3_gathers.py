"""What ZeRO-3 gathers in a step: the bytes of whole parameters in flight, and the traffic.

DeepSpeed (0.19, `partitioned_param_coordinator.py`) gathers a module's own parameters before its forward and backward
pass, and more ahead of time: the next ones in the order of the step before, up to `stage3_prefetch_bucket_size`
elements. After the pass it keeps those that are used again within `stage3_max_reuse_distance` elements, which holds on
to the last layers between the forward and the backward pass. Prefetching stops at `stage3_max_live_parameters`. The
same rules are followed here over the calls of a traced step.

Parameters gathered together arrive in one buffer, from which each is copied; the buffer is freed when the last of them
is first used. A parameter gathered alone arrives in place.

Frozen weights that are gathered a layer at a time (`adept_ds.backbone.layer_gathers`) are none of DeepSpeed's: the
layer at work and the next one are whole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from adept_ds.backbone.layer_gathers import layer_ahead, starts_in_storage
from adept_ds.planner.meta_step import ModuleCall, StepTrace


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter as ZeRO-3 sees it."""

    numel: int
    itemsize: int
    is_trained: bool

    def padded_numel(self, shards: int) -> int:
        """Elements of all shards together; each has as many."""
        return -(-self.numel // shards) * shards


@dataclass(frozen=True)
class GatherSettings:
    """The settings of `zero_optimization` that matter here, with DeepSpeed's defaults; all in elements."""

    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000

    @classmethod
    def of(cls, zero_optimization: Mapping[str, Any]) -> GatherSettings:
        """Read them from the completed section, where each may have the prefix `stage3_`."""
        given = {name: zero_optimization.get(f"stage3_{name}", zero_optimization.get(name)) for name in vars(cls())}
        return cls(**{name: int(value) for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Gathers:
    """What one forward and backward pass gathers."""

    peak_bytes: int
    """Most bytes of whole parameters and of buffers that they arrive in."""
    gathered_bytes: int
    """Bytes gathered in all, each time counted in full."""


@dataclass
class _Handle:
    """Parameters that were gathered together."""

    waiting: set[int]
    buffer_bytes: int
    is_copied: bool
    """Whether the parameters have been copied out of the buffer."""


@dataclass
class _Memory:
    """Whole parameters and buffers."""

    live: int = 0
    peak: int = 0
    gathered: int = 0

    def allocate(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def simulate_gathers(
    trace: StepTrace,
    by_layer: bool,
    parameters: Sequence[ShardedParameter],
    shards: int,
    settings: GatherSettings,
    is_offloaded: bool = False,
) -> Gathers:
    """Follow a step that DeepSpeed has seen before.

    Args:
        trace: The step.
        by_layer: Whether frozen weights are gathered a layer at a time.
        parameters: All parameters of the model.
        shards: Ranks that share a parameter.
        settings: The rules' sizes.
        is_offloaded: Whether the shards are elsewhere than the whole parameters. Otherwise one rank's shard is the
            parameter, and nothing is gathered.
    """
    if shards == 1 and not is_offloaded:
        return Gathers(0, 0)
    memory = _Memory()
    layers = _Layers(trace.layers if by_layer else {}, parameters, shards, memory)
    without_hooks = trace.by_layer if by_layer else frozenset()
    calls = [call for call in trace.calls if call.module not in without_hooks]
    taken = {parameter for own in layers.own.values() for parameter in own}
    coordinator = _Coordinator(calls, trace.modules, parameters, taken, shards, settings, memory)
    for call in trace.calls:
        if call.module not in without_hooks:
            coordinator.follow(call)
        if call.module in layers.own and call.event == "enter":
            layers.enter(call)
    return Gathers(memory.peak, memory.gathered)


class _Layers:
    """The gathers of `adept_ds.backbone.layer_gathers`.

    Args:
        own: Of each layer, as an index of a module, its parameters.
        parameters: As in `simulate_gathers`, as are `shards`.
        shards: Ranks that share a parameter.
        memory: What is whole at a time.
    """

    def __init__(
        self,
        own: Mapping[int, Sequence[int]],
        parameters: Sequence[ShardedParameter],
        shards: int,
        memory: _Memory,
    ) -> None:
        self.own, self._memory = own, memory
        self._order = list(own)
        self._sizes = [
            [parameters[index].padded_numel(shards) * parameters[index].itemsize for index in own[layer]]
            for layer in self._order
        ]
        self._whole: set[int] = set()

    def enter(self, call: ModuleCall) -> None:
        """Gather the layer that begins its pass, and the next one; drop all others."""
        index = self._order.index(call.module)
        ahead = layer_ahead(index, len(self._order), is_backward=call.is_recomputed or not call.is_forward)
        for other in self._whole - {index, ahead}:
            self._memory.live -= starts_in_storage(self._sizes[other])[-1]
        for wanted in {index, ahead} - self._whole:
            self._memory.allocate(starts_in_storage(self._sizes[wanted])[-1])
            self._memory.gathered += sum(self._sizes[wanted])
        self._whole = {index, ahead}


@dataclass
class _Coordinator:
    """DeepSpeed's coordinator within one step."""

    calls: Sequence[ModuleCall]
    modules: Sequence[Sequence[int]]
    parameters: Sequence[ShardedParameter]
    taken: Set[int]
    """Parameters that are none of DeepSpeed's."""
    shards: int
    settings: GatherSettings
    memory: _Memory
    _step: int = 0
    """Modules fetched so far."""
    _available_numel: int = 0
    _available: set[int] = field(default_factory=set)
    _in_flight: dict[int, _Handle] = field(default_factory=dict)
    _users: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Of each parameter, the modules that must have it until they leave."""
    _in_backward: dict[int, None] = field(default_factory=dict)
    """Modules whose backward pass goes on, in the order of their beginning."""
    _recomputed: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Of each such module, parameters of recomputed layers that are released with it."""
    _fetched_for: defaultdict[int, int] = field(default_factory=lambda: defaultdict(lambda: -1))
    """Of each parameter, the last step that it is known to be fetched for."""

    def __post_init__(self) -> None:
        order = [call.module for call in self.calls if call.event == "enter"]
        self._uses: defaultdict[int, list[int]] = defaultdict(list)
        for step, module in enumerate(order):
            for parameter in self.modules[module]:
                self._uses[parameter].append(step)
        own_numel = [sum(self.parameters[parameter].numel for parameter in own) for own in self.modules]
        self._numel_before = list(accumulate((own_numel[module] for module in order), initial=0))
        """Elements of all modules fetched before each step."""
        self._queue = deque(
            (parameter, step) for step, module in enumerate(order) for parameter in self.modules[module]
        )
        # Small parameters stay whole from the first step on.
        self._persistent = {
            index
            for index, parameter in enumerate(self.parameters)
            if parameter.numel <= self.settings.param_persistence_threshold and index not in self.taken
        }
        self._available |= self._persistent
        for parameter in self._persistent:
            self.memory.allocate(self.parameters[parameter].numel * self.parameters[parameter].itemsize)

    def follow(self, call: ModuleCall) -> None:
        """Do what DeepSpeed does at this call."""
        if call.event == "enter":
            self.fetch(call)
        else:
            self.release(call)

    def fetch(self, call: ModuleCall) -> None:
        """Gather the parameters of a module that begins its pass, and some that come after it."""
        own = self.modules[call.module]
        if not call.is_forward:
            self._in_backward.setdefault(call.module)
        self._gather([parameter for parameter in own if not self._is_here(parameter)])
        for parameter in own:
            self._users[parameter].add(call.module)
            if call.is_recomputed and self._in_backward and not self.parameters[parameter].is_trained:
                # The recomputed forward pass ends before the backward pass that it serves has used the parameter.
                owner = next(reversed(self._in_backward))
                self._recomputed[owner].add(parameter)
                self._users[parameter].add(owner)
            if parameter in self._in_flight:
                self._wait(parameter)
        self._prefetch({parameter for parameter in own if self._fetched_for[parameter] < self._step})
        self._step += 1

    def release(self, call: ModuleCall) -> None:
        """Drop what a module that ends its pass leaves unneeded for a while."""
        own = set(self.modules[call.module])
        releasable = {parameter for parameter in own - self._persistent if not self._is_reused_soon(parameter)}
        if not call.is_forward:
            recomputed = self._recomputed.pop(call.module, set())
            releasable |= recomputed - self._persistent
            own |= recomputed
            self._in_backward.pop(call.module, None)
        for parameter in own:
            self._users[parameter].discard(call.module)
            if parameter in releasable and parameter in self._available and not self._users[parameter]:
                self._available.remove(parameter)
                self._available_numel -= self.parameters[parameter].numel
                self.memory.live -= self._bytes(parameter)

    def _is_here(self, parameter: int) -> bool:
        return parameter in self._available or parameter in self._in_flight

    def _is_reused_soon(self, parameter: int) -> bool:
        if self._fetched_for[parameter] > self._step:
            return True  # the prefetcher has passed over this use, since the parameter was there
        uses = self._uses[parameter]
        position = bisect_left(uses, self._step)
        if position == len(uses):
            return False
        distance = self._numel_before[uses[position]] - self._numel_before[self._step]
        return distance < self.settings.max_reuse_distance

    def _prefetch(self, new: set[int]) -> None:
        passed: set[int] = set()
        while self._queue and len(passed) < len(new):
            parameter, step = self._queue.popleft()
            self._fetched_for[parameter] = step
            passed.add(parameter)
        limit = min(
            self.settings.max_live_parameters - self._available_numel,
            self.settings.prefetch_bucket_size,
        )
        ahead: dict[int, None] = {}
        numel = 0
        while self._queue and numel < limit:
            parameter, step = self._queue.popleft()
            self._fetched_for[parameter] = max(self._fetched_for[parameter], step)
            if parameter not in ahead and not self._is_here(parameter):
                ahead[parameter] = None
                numel += self.parameters[parameter].numel
        self._gather(list(ahead))

    def _gather(self, wanted: Sequence[int]) -> None:
        if not wanted:
            return
        size = sum(self._bytes(parameter) for parameter in wanted)
        is_single = len(wanted) == 1 or self.shards == 1
        handle = _Handle(set(wanted), 0 if is_single else size, is_copied=is_single)
        for parameter in wanted:
            self._in_flight[parameter] = handle
            self._available_numel += self.parameters[parameter].numel
        self.memory.allocate(size)
        self.memory.gathered += size

    def _wait(self, parameter: int) -> None:
        handle = self._in_flight.pop(parameter)
        if not handle.is_copied:
            handle.is_copied = True
            self.memory.allocate(sum(self._bytes(other) for other in handle.waiting))
        self._available.add(parameter)
        handle.waiting.remove(parameter)
        if not handle.waiting:
            self.memory.live -= handle.buffer_bytes

    def _bytes(self, parameter: int) -> int:
        return self.parameters[parameter].padded_numel(self.shards) * self.parameters[parameter].itemsize

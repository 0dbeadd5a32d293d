"""Trains as `launchers/train.py` does, and writes what DeepSpeed's ZeRO-3 held and gathered on rank 0 as JSON.

    deepspeed tests/distributed/zero3_meter.py --config FILE --out FILE

Whole parameters and the buffers that they arrive in are counted by their storages, whenever one may have been added.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero import partition_parameters as zero3
from deepspeed.runtime.zero.partitioned_param_coordinator import InflightParamRegistry, PartitionedParameterCoordinator

from adept_ds.backbone.layer_gathers import LayerGathers, _Unit
from adept_ds.config.command_line import parse_command_line
from adept_ds.entry_point import run_entry_point
from adept_ds.rank_environment import is_main_rank
from adept_ds.training.engine import Engine
from adept_ds.training.recipe import train


class Meter:
    """Bytes per step, from calls that it puts itself around."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []
        self.model: torch.nn.Module | None = None
        self.layers: LayerGathers | None = None
        self.shard_bytes = 0
        self._peak = self._gathered = 0

    def install(self) -> None:
        """Watch all of DeepSpeed's gathers in this process from now on."""
        registries: list[InflightParamRegistry] = []
        add = InflightParamRegistry.__setitem__

        def count(registry: Any, param: Any, handle: Any) -> None:
            add(registry, param, handle)
            if registry not in registries:
                registries.append(registry)
            self._gathered += param.ds_numel * param.element_size()

        def sampled(name: str, owner: type) -> None:
            original = getattr(owner, name)

            def call(instance: Any, *args: Any, **kwargs: Any) -> Any:
                result = original(instance, *args, **kwargs)
                handles = [handle for registry in registries for handle in registry.values()]
                self._sample([*handles, instance] if owner is zero3.AllGatherCoalescedHandle else handles)
                return result

            setattr(owner, name, call)

        InflightParamRegistry.__setitem__ = count
        sampled("wait", zero3.AllGatherCoalescedHandle)
        sampled("fetch_sub_module", PartitionedParameterCoordinator)
        self._on_return(_Unit, "gather", self._count_layer)
        sampled("enter", LayerGathers)
        self._on_return(PartitionedParameterCoordinator, "reset_step", lambda _: self._close_step())
        self._on_return(Engine, "__init__", self._weigh)

    @staticmethod
    def _on_return(owner: type, name: str, callback: Callable[[Any], None]) -> None:
        original = getattr(owner, name)

        def call(instance: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(instance, *args, **kwargs)
            callback(instance)
            return result

        setattr(owner, name, call)

    def _count_layer(self, unit: _Unit) -> None:
        parameters: Any = unit._parameters
        self._gathered += sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)

    def _weigh(self, engine: Engine) -> None:
        self.model, self.layers = engine.model, engine.layers
        frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        self.shard_bytes = sum(parameter.ds_tensor.numel() * parameter.ds_tensor.element_size() for parameter in frozen)

    def _sample(self, handles: list[Any]) -> None:
        if self.model is None:
            return
        tensors = [parameter.data for parameter in self.model.parameters()]
        for handle in handles:
            for part in getattr(handle, "handles", [handle]):
                tensors += getattr(part, "partitions", [])
        for unit in self.layers._units if self.layers else ():
            tensors.append(torch.empty(0, dtype=torch.uint8).set_(unit._storage))
        storages = {tensor.data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.numel()}
        unique = {storage.data_ptr(): storage.nbytes() for storage in storages.values()}
        self._peak = max(self._peak, sum(unique.values()))

    def _close_step(self) -> None:
        self.steps.append({"peak": self._peak, "gathered": self._gathered})
        self._peak = self._gathered = 0


def main(arguments: list[str]) -> None:
    """Train and write the measurements."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--out", required=True)

    flags, loaded = parse_command_line(arguments, "zero3_meter.py", __doc__ or "", add_flags)
    meter = Meter()
    meter.install()
    train(loaded.run)
    if is_main_rank():
        Path(flags.out).write_text(json.dumps({"shard": meter.shard_bytes, "steps": meter.steps}))


if __name__ == "__main__":
    run_entry_point(main)

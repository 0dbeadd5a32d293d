"""A backbone that ZeRO-3 has split over ranks, used as it is: without an engine, which is for training.

Each decoder layer, and what is outside of the layers, is gathered as a whole when it is called, by one collective, and
split again behind it. So a rank holds its part of all weights and one layer, and what a method adds to the backbone
stays whole and in its own precision, as on one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from adept_ds.backbone.load import load_backbone
from adept_ds.backbone.sharding import gathered, is_sharded
from adept_ds.config.deepspeed import SHARDED_STAGE
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError


def load_split_backbone(
    config: ModelConfig, device: torch.device, zero: dict[str, Any], show_progress: bool
) -> PreTrainedModel:
    """Return the backbone, split over all ranks as it is read; see `gather_in_forward`. Collective.

    Args:
        config: As `load_backbone`, with the errors that it raises.
        device: This rank's.
        zero: `deepspeed.zero_optimization`, of which `offload_param` counts.
        show_progress: Whether this rank shows the progress of loading.

    Raises:
        UserError: Weights are to lie on a disk.
    """
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise UserError(
            "eval.sharding zero3 reads no weights from a disk, and deepspeed.zero_optimization.offload_param.device is "
            "'nvme'; expected 'cpu', or no offload_param"
        )
    section: dict[str, Any] = {"stage": SHARDED_STAGE}
    if "offload_param" in zero:
        section["offload_param"] = dict(zero["offload_param"])
    deepspeed_config = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": dist.get_world_size(),
        "bf16": {"enabled": config.dtype == "bf16"},
        "fp16": {"enabled": config.dtype == "fp16"},
        "zero_optimization": section,
    }
    return load_backbone(config, device, deepspeed_config, show_progress=show_progress)


def gather_in_forward(backbone: nn.Module) -> None:
    """Have the split parameters of a backbone gathered where they are used; does nothing if none are split.

    Call it when all layers are in their places. From then on all ranks must make the same calls.
    """
    for module, parameters in _units(backbone):
        gathering = _Gathering(parameters)
        module.register_forward_pre_hook(gathering.enter)
        module.register_forward_hook(gathering.leave, always_call=True)


class _Gathering:
    """Holds the full values of some parameters within a module's forward."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._held: AbstractContextManager[None] | None = None

    def enter(self, module: nn.Module, args: Any) -> None:
        self._held = gathered(self._parameters)
        self._held.__enter__()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._held is not None:
            self._held.__exit__(None, None, None)
            self._held = None


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """The modules whose parameters are gathered together: the members of lists, as layers are, whole, and of all other
    modules what they have themselves."""
    is_list = isinstance(module, nn.ModuleList)
    own: list[Tensor] = [parameter for parameter in module.parameters(recurse=False) if is_sharded(parameter)]
    if own:
        yield module, own
    for child in module.children():
        if is_list:
            parameters: list[Tensor] = [parameter for parameter in child.parameters() if is_sharded(parameter)]
            if parameters:
                yield child, parameters
        else:
            yield from _units(child)


def held_bytes(backbone: nn.Module) -> tuple[int, int]:
    """Bytes of the split weights that this rank keeps, and of the largest module as it is gathered."""
    parts = [parameter.ds_tensor.nbytes for parameter in backbone.parameters() if is_sharded(parameter)]  # type: ignore[attr-defined]
    largest = max(
        sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)  # type: ignore[attr-defined]
        for _, parameters in _units(backbone)
    )
    return sum(parts), largest

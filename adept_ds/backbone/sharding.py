"""Parameters that ZeRO-3 splits over ranks: splitting them as they are loaded, and their full values and sizes."""

from __future__ import annotations

import atexit
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adept_ds.backbone.blocks import backbone_layers
from adept_ds.errors import NodeError, UserError

SPARE_BUFFERS = 4
"""Buffers for reading from a disk beside those for the weights of one layer."""


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 owns this parameter; its local shape is then 0 outside a gather."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The parameter's shape as the model declared it, sharded or not."""
    # Not by getattr: a sharded parameter's own shape is 0, which must not be taken where DeepSpeed renames the other.
    return tuple(parameter.ds_shape if is_sharded(parameter) else parameter.shape)  # type: ignore[attr-defined]


def full_numel(parameter: Tensor) -> int:
    """Number of elements as the model declared it, sharded or quantised or not."""
    if hasattr(parameter, "dense_numel"):
        return int(parameter.dense_numel)
    return int(parameter.ds_numel if is_sharded(parameter) else parameter.numel())  # type: ignore[attr-defined]


def own_numel(parameter: Any) -> int:
    """Number of a sharded parameter's elements in this rank's part. What the part has behind them fills it up, and is
    memory as it was found: in the part of the gradient too."""
    part = _part(parameter.ds_numel, parameter.ds_tensor.ds_numel, parameter.ds_zero_partition_rank)
    return int(part.stop - part.start)


def _part(numel: int, size: int, rank: int) -> slice:
    """The part with number `rank` of `numel` elements that are cut into parts of `size`; the last ones may be short."""
    return slice(min(rank * size, numel), min((rank + 1) * size, numel))


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


def node_group(ranks_by_node: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """Return the process group of this rank's node, None if there is only one node. Collective.

    Args:
        ranks_by_node: The ranks of each node; all nodes have as many.
    """
    if len(ranks_by_node) == 1:
        return None
    groups = [dist.new_group(list(ranks)) for ranks in ranks_by_node]
    return next(group for group, ranks in zip(groups, ranks_by_node, strict=True) if dist.get_rank() in ranks)


def prepare_disk(offload: dict[str, Any], backbone: nn.Module, ranks: int) -> None:
    """Give this rank a folder and buffers for weights that are offloaded to a disk.

    The folder is a new one in `nvme_path`, which other runs may use too, and goes when the process ends. DeepSpeed
    reads a weight's part into a buffer, which the part occupies while the weight is used. Where activations are
    recomputed, that is as long as the layer's backward pass. If `buffer_size` (elements) or `buffer_count` is not set,
    a buffer holds the largest part, and there is one for every matrix of a layer.

    Args:
        offload: The section `offload_param` of the completed configuration, which is changed.
        backbone: Not yet split; its parameters may be on the meta device.
        ranks: How many ranks share a parameter.

    Raises:
        UserError: The buffers that are set are too small.
        NodeError: This node cannot write into `nvme_path`, or not directly, as on some file systems.
    """
    largest = max(-(-parameter.numel() // ranks) for parameter in backbone.parameters())
    if offload.setdefault("buffer_size", largest) < largest:
        raise UserError(
            f"deepspeed.zero_optimization.offload_param.buffer_size is {offload['buffer_size']}, and a rank's part of "
            f"the largest weight has {largest} elements; expected that or more, or no value"
        )
    matrices = (sum(weight.dim() > 1 for weight in layer.parameters()) for layer in backbone_layers(backbone))
    offload.setdefault("buffer_count", max(matrices, default=0) + SPARE_BUFFERS)
    try:
        folder = tempfile.mkdtemp(prefix="adept_ds-", dir=offload["nvme_path"])
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.close(os.open(Path(folder) / "probe", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        raise NodeError(
            f"deepspeed.zero_optimization.offload_param.nvme_path is {offload['nvme_path']!r}, where {platform.node()} "
            f"cannot write past the cache: {error.strerror}; expected a folder on a local disk that you may write to"
        ) from None
    offload["nvme_path"] = folder


class Partitioner:
    """Splits parameters over ranks by ZeRO-3, one by one, before there is an engine.

    DeepSpeed's own way in (`zero.Init`) wants every parameter whole on every rank first, and sends it there. Here a
    rank hands in a tensor of which only its own part (`own_part`) has to hold values.

    Args:
        config: The completed `deepspeed` section, at stage 3. Its disk, if it offloads to one, is prepared.
        backbone: Whose parameters are going to be split.
        device: This rank's device.
        group: The ranks among which frozen parameters are split; all if None. What is not split here is split over all
            ranks by the engine.
    """

    def __init__(
        self,
        config: dict[str, Any],
        backbone: nn.Module,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        import deepspeed

        offload = config["zero_optimization"].get("offload_param", {})
        if offload.get("device") == "nvme":
            prepare_disk(offload, backbone, dist.get_world_size(group))
        # An empty module: sets up what DeepSpeed needs and splits nothing yet.
        self._zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config)
        self.device = device
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def own_part(self, numel: int) -> slice:
        """The part of a flattened parameter of `numel` elements that this rank will keep."""
        return _part(numel, -(-numel // self.size), self.rank)

    def split(self, parameter: nn.Parameter) -> None:
        """Keep this rank's part and release the rest. Every rank calls this for the same parameters in one order.

        Raises:
            RuntimeError: DeepSpeed kept another part than `own_part`, the only one with values.
        """
        if self.group is not None:
            # DeepSpeed splits a parameter over all ranks unless it names a group (there: those that hold an expert).
            parameter.ds_zero_partition_process_group = self.group  # type: ignore[attr-defined]
        self._zero._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
        self._check_part(parameter)
        # Where it will be gathered; code outside asks an empty parameter for its device too.
        parameter.data = parameter.data.to(self.device)

    def _check_part(self, parameter: Any) -> None:
        """By a group that it does not look at any more, or another way to cut, DeepSpeed would keep memory that nothing
        was written to, and training would go on with that."""
        kept = (parameter.ds_zero_partition_rank, parameter.ds_tensor.ds_numel)
        expected = (self.rank, -(-parameter.ds_numel // self.size))
        if kept != expected or not is_sharded(parameter):
            raise RuntimeError(
                f"DeepSpeed keeps part {kept[0]} with {kept[1]} elements of a weight, expected part {expected[0]} with "
                f"{expected[1]}: this version of it splits weights in another way"
            )

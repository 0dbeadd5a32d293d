"""Filling a backbone weight by weight from safetensors: read a slice, convert, quantise, split, drop, go on.

No rank ever holds more than its final part of the model and one linear layer beside it, or two layers of experts. Plain
weights are read from the mapped file by each rank for its own part only. Weights that are stacked or cut on the way,
and quantised ones, are made in turns, each by one rank, and sent to the others; quantised ones may be read back from a
cache of earlier conversions instead, again by each rank for its own part.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform

from adept_ds.backbone.quantization import QuantizedLinear, Scheme, quantize_linears
from adept_ds.backbone.sharding import Partitioner
from adept_ds.backbone.weight_sources import WeightFiles, WeightMap, map_weights
from adept_ds.config.run import ModelConfig
from adept_ds.distributed import on_all_ranks, own_rank, rank_count

CACHE_FORMAT = 1
"""Raised whenever the layout of quantised weights changes."""
_CACHE_FILE_BYTES = 64 << 20
_M_MMAP_THRESHOLD = -3  # of malloc.h


@contextmanager
def _freed_memory_goes_back() -> Iterator[None]:
    """Within the block the C library hands blocks of over 1 MB back to the system as soon as they are freed.

    glibc keeps freed blocks of up to 32 MB, which lie between parts of the model that stay and add up to a fifth of it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)


class QuantizedCache:
    """A folder with the quantised weights of one checkpoint in one scheme and dtype.

    It is filled under a temporary name, so a folder that is there is whole; of two jobs that fill it the first wins.
    The checkpoint is recognised by its files' places, sizes and times. Ranks read it if all of them see it.
    """

    def __init__(self, root: Path, config: ModelConfig, weights: Iterable[Path]) -> None:
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in map(Path.resolve, weights)]
        scheme = Scheme.of(config)
        held = (scheme.name, scheme.double) if scheme else None
        key = json.dumps([CACHE_FORMAT, held, config.dtype, sorted(files)])
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        self.folder = root / f"{Path(config.name_or_path).name}-{config.quantization}-{digest}"
        self._temporary = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")
        self._pending: dict[str, Tensor] = {}
        self._written = 0

    def paths(self) -> list[Path]:
        """The files of a whole cache; none if there is no such cache yet."""
        return sorted(self.folder.glob("*.safetensors"))

    def add(self, name: str, storage: Tensor) -> None:
        """Take one weight's storage; it is written once enough have come for a file."""
        self._pending[name] = storage.cpu()
        if sum(tensor.nbytes for tensor in self._pending.values()) >= _CACHE_FILE_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write the rest and put the folder in its place."""
        self._flush()
        try:
            self._temporary.rename(self.folder)
        except OSError:  # another job has put its own there, which is the same
            shutil.rmtree(self._temporary)

    def _flush(self) -> None:
        if self._pending:
            self._temporary.mkdir(parents=True, exist_ok=True)
            save_file(self._pending, self._temporary / f"{self._written:05d}.safetensors")
            self._written += 1
            self._pending = {}


def fill_backbone(
    backbone: PreTrainedModel,
    config: ModelConfig,
    weights: list[Path],
    transforms: Sequence[WeightTransform],
    device: torch.device,
    partitioner: Partitioner | None,
    show_progress: bool,
) -> list[str]:
    """Put a checkpoint's weights into a backbone whose parameters are on the meta device. Collective.

    Args:
        backbone: In its final dtype; its linear layers are quantised here if the config says so.
        config: What is loaded.
        weights: The checkpoint's safetensors files.
        transforms: How `transformers` renames and converts the weights of such a checkpoint.
        device: Where the weights go.
        partitioner: Splits every parameter; None keeps all of them whole on each rank.
        show_progress: Whether this rank shows the progress.

    Returns:
        The checkpoint's tensors that the backbone has no place for.

    Raises:
        UserError: As `map_weights`, before any weight is read; or nothing could be quantised.
    """
    scheme = Scheme.of(config)
    with WeightFiles(weights) as files, _freed_memory_goes_back():
        found = map_weights(backbone, files, transforms)
        layers = quantize_linears(backbone, scheme) if scheme else {}
        slots = _slots(backbone, found, files)
        progress = tqdm(total=len(slots), desc="load", unit="weight", disable=not show_progress)
        left: dict[str, _Slot] = {}
        for slot in slots:
            if not slot.has_source:
                slot.place(_computed(backbone, slot).to(device), partitioner)
            elif found.sources[slot.name].is_plain and slot.name not in layers:
                slot.place(_own_values(slot, found.read(slot.name, files), device, partitioner), partitioner)
            else:
                left[slot.name] = slot
                continue
            progress.update()
        for name, full in _made(left, layers, found, files, config, weights, device, partitioner):
            left[name].place(full, partitioner)
            progress.update()
        for name, buffer in backbone.named_buffers():
            if name in found.sources:
                buffer.copy_(found.read(name, files))
    _move_buffers(backbone, device)
    progress.close()
    return found.unused


def fill_randomly(
    backbone: PreTrainedModel, config: ModelConfig, device: torch.device, partitioner: Partitioner | None
) -> None:
    """As `fill_backbone`, with matrices drawn from N(0, 0.02^2) and vectors of ones. All ranks draw the same."""
    scheme = Scheme.of(config)
    layers = quantize_linears(backbone, scheme) if scheme else {}
    generator = torch.Generator(device).manual_seed(0)
    slots: dict[int, _Slot] = {}
    for name, module, attribute, parameter in _parameters(backbone):
        slot = slots.setdefault(id(parameter), _Slot(parameter, has_source=False))
        slot.names.append(name)
        slot.places.append((module, attribute))
    for slot in slots.values():
        layer, dtype = layers.get(slot.name), slot.parameter.dtype
        shape = (layer.out_features, layer.in_features) if layer else slot.parameter.shape
        values = torch.ones(shape, dtype=dtype, device=device)
        if len(shape) > 1:
            values.normal_(std=0.02, generator=generator)
        slot.place(layer.scheme.quantize(values, device, dtype) if layer else values, partitioner)
    _move_buffers(backbone, device)


def _move_buffers(backbone: PreTrainedModel, device: torch.device) -> None:
    for module in backbone.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


@dataclass
class _Slot:
    """One parameter with all the places that it has in the model; several if it is tied."""

    parameter: nn.Parameter
    has_source: bool
    """Whether the checkpoint has it, under the first of its names."""
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]

    def place(self, full: Tensor, partitioner: Partitioner | None) -> None:
        """Make `full`, which has values in this rank's part at least, the parameter in all its places."""
        parameter = nn.Parameter(full, requires_grad=False)
        parameter.__dict__.update(self.parameter.__dict__)
        if partitioner:
            partitioner.split(parameter)
        for module, attribute in self.places:
            module._parameters[attribute] = parameter


def _parameters(backbone: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Name, module and attribute of every place of every parameter; a tied one comes several times."""
    for path, module in backbone.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{attribute}".lstrip("."), module, attribute, parameter


def _slots(backbone: PreTrainedModel, found: WeightMap, files: WeightFiles) -> list[_Slot]:
    """The backbone's parameters with what fills them.

    The checkpoint decides what is tied: `transformers` ties the head of every T5 to its table, and unties it where the
    files hold two values, as those of T5 v1.1 do.
    """
    slots: dict[int, list[_Slot]] = {}
    unfilled: list[tuple[str, nn.Module, str, nn.Parameter]] = []
    for name, module, attribute, parameter in _parameters(backbone):
        if name not in found.sources:
            unfilled.append((name, module, attribute, parameter))
            continue
        alike = slots.setdefault(id(parameter), [])
        equal = (slot for slot in alike if torch.equal(found.read(slot.name, files), found.read(name, files)))
        slot = next(equal, None)
        if slot is None:
            slot = _Slot(parameter, has_source=True)
            if alike:
                backbone.all_tied_weights_keys.pop(name, None)
            alike.append(slot)
        slot.names.append(name)
        slot.places.append((module, attribute))
    for name, module, attribute, parameter in unfilled:
        alike = slots.setdefault(id(parameter), [])
        slot = alike[0] if alike else _Slot(parameter, has_source=False)
        if not alike:
            alike.append(slot)
        slot.names.append(name)
        slot.places.append((module, attribute))
    return [slot for alike in slots.values() for slot in alike]


def _computed(backbone: PreTrainedModel, slot: _Slot) -> Tensor:
    """The values that the model's own initialisation gives a parameter, such as positions that are sines."""
    module, attribute = slot.places[0]
    parameter = nn.Parameter(torch.empty_like(slot.parameter, device="cpu"), requires_grad=False)
    module._parameters[attribute] = parameter
    backbone._init_weights(module)
    return parameter.data


def _own_values(slot: _Slot, values: Tensor, device: torch.device, partitioner: Partitioner | None) -> Tensor:
    """The parameter's tensor with this rank's part of `values`; the rest of it is never touched."""
    shape, dtype = slot.parameter.shape, slot.parameter.dtype
    if not partitioner:
        return values.to(device, dtype)  # mapped still where nothing changes
    part = partitioner.own_part(shape.numel())
    # Host memory becomes real where it is written to.
    full = torch.empty(shape, dtype=dtype)
    full.view(-1)[part] = values.reshape(-1)[part]
    return full


def _made(
    left: Mapping[str, _Slot],
    layers: Mapping[str, QuantizedLinear],
    found: WeightMap,
    files: WeightFiles,
    config: ModelConfig,
    weights: list[Path],
    device: torch.device,
    partitioner: Partitioner | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of each weight that is no plain one: the storage of quantised ones, from the cache or made
    and put there, and the others in full."""
    cache = QuantizedCache(Path(config.quantized_cache), config, weights) if config.quantized_cache and layers else None
    stored: set[str] = set()
    if cache and on_all_ranks(bool(cache.paths())):
        with WeightFiles(cache.paths()) as cached:
            for name, layer in layers.items():
                part = partitioner.own_part(layer.weight.numel()) if partitioner else slice(None)
                storage = torch.empty_like(layer.weight, device="cpu" if partitioner else device)
                storage[part] = cached[name][part]
                yield name, storage
        cache, stored = None, set(layers)
    is_writer = cache is not None and own_rank() == 0
    for name, full in _converted([left[name] for name in left if name not in stored], layers, found, files, device):
        if cache and is_writer and name in layers:
            cache.add(name, full)
        yield name, full
    if cache and is_writer:
        cache.finish()


def _converted(
    slots: list[_Slot],
    layers: Mapping[str, QuantizedLinear],
    found: WeightMap,
    files: WeightFiles,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Make as many weights at a time as there are ranks, each by one of them, which sends it to the others."""
    rank, ranks = own_rank(), rank_count()
    # Those that are cut from the same tensors are made together.
    groups: dict[int, list[_Slot]] = {}
    for slot in slots:
        groups.setdefault(id(found.sources[slot.name]), []).append(slot)
    order = list(groups.values())
    for start in range(0, len(order), ranks):
        turn = order[start : start + ranks]
        own: dict[str, Tensor] = {}
        if rank < len(turn):
            values = found.sources[turn[rank][0].name].read(files)
            for slot in turn[rank]:
                value, layer = values.pop(slot.name), layers.get(slot.name)
                own[slot.name] = (
                    layer.storage_of(value, device) if layer else value.to(device, slot.parameter.dtype).contiguous()
                )
        for owner, group in enumerate(turn):
            for slot in group:
                full = own.pop(slot.name) if owner == rank else torch.empty_like(slot.parameter, device=device)
                if ranks > 1:
                    dist.broadcast(full.view(-1).view(torch.uint8), owner)
                yield slot.name, full

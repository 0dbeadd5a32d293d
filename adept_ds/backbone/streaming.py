"""Filling a backbone weight by weight from safetensors: read a slice, quantise, split, drop, go on.

No rank ever holds more than its final part of the model and one linear layer beside it. Plain weights are read from the
mapped file by each rank for its own part only. Quantised ones are converted in turns, each by one rank, and sent to the
others; or read back from a cache of earlier conversions, again by each rank for its own part.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from adept_ds.backbone.quantization import QuantizedLinear, Scheme, quantize_linears
from adept_ds.backbone.sharding import Partitioner
from adept_ds.config.run import ModelConfig
from adept_ds.distributed import on_all_ranks, own_rank, rank_count
from adept_ds.errors import UserError

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


class WeightFiles(ExitStack):
    """Safetensors files as one mapping of names to tensors, mapped into memory and read where they are touched."""

    def __init__(self, paths: Iterable[Path]) -> None:
        super().__init__()
        self._file_of: dict[str, Any] = {}
        for path in paths:
            file = self.enter_context(safe_open(path, framework="pt"))
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as it is in the file; nothing is read yet."""
        return self._file_of[name].get_tensor(name)


class QuantizedCache:
    """A folder with the quantised weights of one checkpoint in one scheme and dtype.

    It is filled under a temporary name, so a folder that is there is whole; of two jobs that fill it the first wins.
    The checkpoint is recognised by its files' places, sizes and times. Ranks read it if all of them see it.
    """

    def __init__(self, root: Path, config: ModelConfig, weights: Iterable[Path]) -> None:
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in map(Path.resolve, weights)]
        scheme = Scheme.of(config)
        key = json.dumps([CACHE_FORMAT, asdict(scheme) if scheme else None, config.dtype, sorted(files)])
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
    device: torch.device,
    partitioner: Partitioner | None,
    show_progress: bool,
) -> None:
    """Put a checkpoint's weights into a backbone whose parameters are on the meta device. Collective.

    Args:
        backbone: In its final dtype; its linear layers are quantised here if the config says so.
        config: What is loaded.
        weights: The checkpoint's safetensors files.
        device: Where the weights go.
        partitioner: Splits every parameter; None keeps all of them whole on each rank.
        show_progress: Whether this rank shows the progress.

    Raises:
        UserError: The checkpoint lacks a weight or has one of another shape.
    """
    scheme = Scheme.of(config)
    layers = quantize_linears(backbone, scheme) if scheme else {}
    with WeightFiles(weights) as files, _freed_memory_goes_back():
        slots = _slots(backbone, files)
        progress = tqdm(total=len(slots), desc="load", unit="weight", disable=not show_progress)
        for slot in slots:
            if slot.name not in layers:
                slot.place(_own_values(slot, files[slot.source], device, partitioner), partitioner)
                progress.update()
        by_name = {slot.name: slot for slot in slots}
        if scheme:
            sources = {name: by_name[name].source for name in layers}
            for name, storage in _storages(layers, sources, files, config, weights, device, partitioner):
                by_name[name].place(storage, partitioner)
                progress.update()
    _move_buffers(backbone, device)
    progress.close()


def fill_randomly(
    backbone: PreTrainedModel, config: ModelConfig, device: torch.device, partitioner: Partitioner | None
) -> None:
    """As `fill_backbone`, with matrices drawn from N(0, 0.02^2) and vectors of ones. All ranks draw the same."""
    scheme = Scheme.of(config)
    layers = quantize_linears(backbone, scheme) if scheme else {}
    generator = torch.Generator(device).manual_seed(0)
    slots: dict[int, _Slot] = {}
    for name, module, attribute, parameter in _parameters(backbone):
        slot = slots.setdefault(id(parameter), _Slot(parameter, source=name))
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
    source: str
    """Its name in the checkpoint."""
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


def _slots(backbone: PreTrainedModel, files: WeightFiles) -> list[_Slot]:
    """The backbone's parameters with what fills them.

    The checkpoint decides what is tied: `transformers` ties the head of every T5 to its table, and unties it where the
    files hold two values, as those of T5 v1.1 do.
    """
    prefix = f"{backbone.base_model_prefix}."
    slots: dict[int, list[_Slot]] = {}
    unfilled: list[tuple[int, str, nn.Module, str]] = []
    for name, module, attribute, parameter in _parameters(backbone):
        # A checkpoint of the model below the LM head lacks the prefix.
        forms = (name, name.removeprefix(prefix), prefix + name)
        source = next((form for form in forms if form in files), None)
        if source is None:
            unfilled.append((id(parameter), name, module, attribute))
            continue
        alike = slots.setdefault(id(parameter), [])
        slot = next((slot for slot in alike if torch.equal(files[slot.source], files[source])), None)
        if slot is None:
            slot = _Slot(parameter, source)
            if alike:
                backbone.all_tied_weights_keys.pop(name, None)
            alike.append(slot)
        slot.names.append(name)
        slot.places.append((module, attribute))
    missing = []
    for key, name, module, attribute in unfilled:
        if key in slots:
            slots[key][0].names.append(name)
            slots[key][0].places.append((module, attribute))
        else:
            missing.append(name)
    if missing:
        raise UserError(
            f"model.name_or_path is {backbone.config.name_or_path!r}, whose safetensors files lack {len(missing)} of "
            f"the weights of {type(backbone).__name__}, the first is {missing[0]}"
        )
    return [slot for alike in slots.values() for slot in alike]


def _own_values(slot: _Slot, values: Tensor, device: torch.device, partitioner: Partitioner | None) -> Tensor:
    """The parameter's tensor with this rank's part of `values`; the rest of it is never touched."""
    shape, dtype = slot.parameter.shape, slot.parameter.dtype
    _check_shape(slot.source, values, shape)
    if not partitioner:
        return values.to(device, dtype, copy=True)
    part = partitioner.own_part(shape.numel())
    # Host memory becomes real where it is written to.
    full = torch.empty(shape, dtype=dtype)
    full.view(-1)[part] = values.reshape(-1)[part]
    return full


def _check_shape(name: str, values: Tensor, shape: torch.Size) -> None:
    if values.shape != shape:
        raise UserError(f"the checkpoint's {name} has shape {list(values.shape)}, expected {list(shape)}")


def _storages(
    layers: dict[str, QuantizedLinear],
    sources: dict[str, str],
    files: WeightFiles,
    config: ModelConfig,
    weights: list[Path],
    device: torch.device,
    partitioner: Partitioner | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the storage of each quantised weight, from the cache or converted and put there."""
    cache = QuantizedCache(Path(config.quantized_cache), config, weights) if config.quantized_cache else None
    if cache and on_all_ranks(bool(cache.paths())):
        with WeightFiles(cache.paths()) as stored:
            for name, layer in layers.items():
                part = partitioner.own_part(layer.weight.numel()) if partitioner else slice(None)
                storage = torch.empty(
                    layer.weight.shape, dtype=layer.weight.dtype, device="cpu" if partitioner else device
                )
                storage[part] = stored[name][part]
                yield name, storage
        return
    is_writer = cache is not None and own_rank() == 0
    for name, storage in _converted(layers, sources, files, device):
        if cache and is_writer:
            cache.add(name, storage)
        yield name, storage
    if cache and is_writer:
        cache.finish()


def _converted(
    layers: dict[str, QuantizedLinear], sources: dict[str, str], files: WeightFiles, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Quantise as many weights at a time as there are ranks, each by one of them, which sends it to the others."""
    rank, ranks, names = own_rank(), rank_count(), list(layers)
    for start in range(0, len(names), ranks):
        turn = names[start : start + ranks]
        own = None
        if rank < len(turn):
            layer = layers[turn[rank]]
            weight = files[sources[turn[rank]]]
            _check_shape(sources[turn[rank]], weight, torch.Size((layer.out_features, layer.in_features)))
            own = layer.scheme.quantize(weight, device, layer.weight.dtype)
        for owner, name in enumerate(turn):
            storage = own if own is not None and owner == rank else torch.empty_like(layers[name].weight, device=device)
            if ranks > 1:
                dist.broadcast(storage.view(torch.uint8), owner)
            yield name, storage

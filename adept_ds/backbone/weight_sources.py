"""Which tensors of a checkpoint make which weights of a model, by the rules of `transformers`.

`transformers` renames weights while it loads, stacks and splits them: Pythia's head is `embed_out` in the files, each
expert of Mixtral a tensor of its own. Its rules are applied to names and shapes first, so that a checkpoint that does
not fit is refused before anything of it is read, and to the values of one weight at a time later.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.loading_report import LoadStateDictInfo

from adept_ds.errors import UserError

_FLOATS = ("F64", "F32", "F16", "BF16")
"""Names in safetensors files of the types that weights are computed with; others are those of quantised ones."""


class WeightFiles(ExitStack):
    """Safetensors files as one mapping of names to tensors, mapped into memory and read where they are touched."""

    def __init__(self, paths: Iterable[Path]) -> None:
        super().__init__()
        self._file_of: dict[str, Any] = {}
        for path in paths:
            file = self.enter_context(safe_open(path, framework="pt"))
            self._file_of |= dict.fromkeys(file.keys(), file)

    def names(self) -> list[str]:
        """All names, layer 2 before layer 10: stacked experts follow this order."""
        return sorted(self._file_of, key=dot_natural_key)

    def shape(self, name: str) -> torch.Size:
        """The tensor's shape; nothing of it is read."""
        return torch.Size(self._file_of[name].get_slice(name).get_shape())

    def type_name(self, name: str) -> str:
        """The tensor's type as the file names it, such as `BF16`."""
        return str(self._file_of[name].get_slice(name).get_dtype())

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as it is in the file; nothing is read yet."""
        return self._file_of[name].get_tensor(name)


@dataclass
class WeightSource:
    """Tensors of a checkpoint that make one weight of the model, or several."""

    target: str
    """The weight that they make, the first one if there are several."""
    converter: WeightConverter | None
    """What makes it of them; None if one tensor is the weight as it is."""
    declared: dict[str, Tensor]
    """All weights and buffers of the model, on the meta device."""
    config: Any
    """The model's config."""
    tensors: list[tuple[str, str]] = field(default_factory=list)
    """Names in the files, each after the converter's pattern that it fits."""

    @property
    def is_plain(self) -> bool:
        """Whether the weight is a tensor of the file as it is."""
        return self.converter is None

    def read(self, files: WeightFiles) -> dict[str, Tensor]:
        """The weights by name: a plain one is mapped and not read yet, others are made anew in the model's dtype."""
        return self._made(files.__getitem__)

    def shapes(self, files: WeightFiles) -> dict[str, torch.Size]:
        """The shapes of what `read` returns."""
        made = self._made(lambda name: torch.empty(files.shape(name), device="meta"))
        return {name: tensor.shape for name, tensor in made.items()}

    def _made(self, tensor_of: Callable[[str], Tensor]) -> dict[str, Tensor]:
        if self.converter is None:
            return {self.target: tensor_of(self.tensors[0][1])}
        converter, dtype = copy.deepcopy(self.converter), self.declared[self.target].dtype
        for pattern, name in self.tensors:
            later: Any = partial(_cast, tensor_of, name, dtype)  # called when the converter needs it
            converter.add_tensor(self.target, name, pattern, later)
        # A quantised layer's weight has another shape by now than the one that converters ask the model for.
        model = SimpleNamespace(get_parameter=self.declared.__getitem__, config=self.config)
        made = converter.convert(self.target, model=model, config=self.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _cast(tensor_of: Callable[[str], Tensor], name: str, dtype: torch.dtype) -> Tensor:
    return tensor_of(name).to(dtype)


@dataclass(frozen=True)
class WeightMap:
    """How a checkpoint fills a model. Weights without a source the model computes itself, as `transformers` knows."""

    sources: dict[str, WeightSource]
    """By the name of the weight or persistent buffer that they fill; one source may fill several."""
    unused: list[str]
    """Tensors of the checkpoint that this model has no place for, but for those that `transformers` passes over too."""

    def read(self, name: str, files: WeightFiles) -> Tensor:
        """The weight or buffer of this name, see `WeightSource.read`."""
        return self.sources[name].read(files)[name]


def map_weights(backbone: PreTrainedModel, files: WeightFiles, transforms: Sequence[WeightTransform]) -> WeightMap:
    """Return which tensors of the files fill which weights of `backbone`, whose parameters are on the meta device.

    Args:
        backbone: In its final dtype, not quantised yet.
        files: The checkpoint.
        transforms: The rules of `transformers` for this model (`get_model_conversion_mapping`).

    Raises:
        UserError: The checkpoint lacks weights, or has some of another shape or of a type that is no number's.
    """
    found, unused = _sources(backbone, files, transforms)
    where = f"model.name_or_path is {backbone.config.name_or_path!r}"
    declared = backbone.state_dict()
    sources: dict[str, WeightSource] = {}
    for source in found:
        names = [name for _, name in source.tensors]
        odd = [name for name in names if files.type_name(name) not in _FLOATS]
        if odd and declared[source.target].is_floating_point():
            raise UserError(
                f"{where}, whose {odd[0]} is of type {files.type_name(odd[0])}: the checkpoint is quantised already; "
                "expected one in 16 or 32 bits (to train on 4-bit or 8-bit weights, set model.quantization)"
            )
        text = names[0] if source.is_plain else f"{source.target} (made of {len(names)} tensors such as {names[0]})"
        try:
            shapes = source.shapes(files)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise UserError(f"{where}, whose {text} cannot be made: {str(error).splitlines()[0]}") from error
        for name, shape in shapes.items():
            if name in declared and shape != declared[name].shape:
                raise UserError(
                    f"{where}, whose {text if name == source.target else name} has shape {list(shape)}, expected "
                    f"{list(declared[name].shape)} by its config.json"
                )
        sources |= {name: source for name in shapes if name in declared}
    missing, unused = _told_apart(backbone, sources, unused)
    if missing:
        raise UserError(
            f"{where}, whose safetensors files lack {len(missing)} of the weights of {type(backbone).__name__}, the "
            f"first is {missing[0]}"
        )
    return WeightMap(sources, unused)


def _sources(
    backbone: PreTrainedModel, files: WeightFiles, transforms: Sequence[WeightTransform]
) -> tuple[list[WeightSource], list[str]]:
    """Put the checkpoint's tensors together by what they make, and list those that make nothing; in the way of
    `transformers.core_model_loading.convert_and_load_state_dict_in_model`."""
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    declared, prefix = backbone.state_dict(), backbone.base_model_prefix
    sources: dict[str, WeightSource] = {}
    unused: list[str] = []
    for name in files.names():
        target, pattern = rename_source_key(name, renamings, converters, prefix, declared)
        if target not in declared and name in declared:
            target, pattern = rename_source_key(name, [], [], prefix, declared)
        if target not in declared or (pattern is None and target in sources):
            unused.append(name)
            continue
        converter = converter_of[pattern] if pattern is not None else None
        source = sources.setdefault(target, WeightSource(target, converter, declared, backbone.config))
        source.tensors.append((pattern or name, name))
    return list(sources.values()), unused


def _told_apart(
    backbone: PreTrainedModel, sources: Mapping[str, WeightSource], unused: list[str]
) -> tuple[list[str], list[str]]:
    """Return the weights that are missing and the tensors that are left over, but for those that `transformers` knows
    need not be there."""
    places: dict[int, list[str]] = {}
    for name, tensor in backbone.state_dict(keep_vars=True).items():
        places.setdefault(id(tensor), []).append(name)  # a tied weight has several
    absent = {names[0] for names in places.values() if not any(name in sources for name in names)}
    info = LoadStateDictInfo(absent, set(unused), set(), [], {}, set())
    backbone._adjust_missing_and_unexpected_keys(info)
    return sorted(info.missing_keys, key=dot_natural_key), sorted(info.unexpected_keys, key=dot_natural_key)

"""A backbone of which the input embedding alone has values: enough for methods that work on it.

Everything else stays on the meta device, and the table is mapped from its file, so that of a model of any size nothing
is read but the rows that are asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from adept_ds.backbone.hub import cached_commit
from adept_ds.backbone.load import (
    DTYPES,
    checkpoint_config,
    empty_backbone,
    trained_part,
    unsharded_creation,
    weight_files,
)
from adept_ds.backbone.text_part import weight_transforms
from adept_ds.backbone.weight_sources import WeightFiles, WeightMap, map_weights
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError


@dataclass(frozen=True)
class OpenTable:
    """A checkpoint's input table in a backbone without other weights; valid until its context ends."""

    backbone: PreTrainedModel
    """The backbone; all but the input table, and what is tied to it, is on the meta device."""
    table: nn.Embedding
    """The layer that reads the input first, an encoder-decoder's encoder's; it may scale its rows."""
    checkpoint: PreTrainedConfig
    """The checkpoint's own config, which may be a composite's."""
    paths: list[Path]
    """The checkpoint's files."""
    files: WeightFiles
    """Their tensors."""
    weights: WeightMap
    """Which of them make which weights."""
    name: str
    """Name of the table's weight in the backbone."""
    tied: Mapping[str, Sequence[str]]
    """Name of each weight of the backbone to all the names that it has there."""

    def read(self, name: str) -> Tensor:
        """The values of a weight of the backbone: its own tensor of the checkpoint, or that of what it is tied to."""
        return self.weights.read(self.source_of(name), self.files)

    def source_of(self, name: str) -> str:
        """The name, among those of a weight, that the checkpoint has values for; its own where there are such."""
        return next((one for one in (name, *self.tied[name]) if one in self.weights.sources), name)

    @property
    def type_name(self) -> str:
        """Type of the table in its file, in the file's words."""
        return self.files.type_name(self.tensor_of(self.source_of(self.name)) or "")

    def tensor_of(self, name: str) -> str | None:
        """Name in the files of the tensor that is the weight `name` as it is; None if there is none, or several."""
        source = self.weights.sources.get(name)
        return source.tensors[0][1] if source and source.is_plain else None


@contextmanager
def open_table(config: ModelConfig) -> Iterator[OpenTable]:
    """Open the input table of a checkpoint, in the precision of `config.dtype`; where that is the file's, it is mapped.

    Raises:
        UserError: There is no such checkpoint, it is not whole, or its table is made of several tensors.
    """
    checkpoint = checkpoint_config(config)
    architecture = trained_part(config, checkpoint)
    paths = weight_files(config)
    with unsharded_creation():
        backbone = empty_backbone(config.model_copy(update={"attn_implementation": None}), architecture)
    with WeightFiles(paths) as files:
        weights = map_weights(backbone, files, weight_transforms(backbone, checkpoint))
        reader = backbone.get_encoder() if architecture.is_encoder_decoder else backbone
        table = cast(nn.Embedding, reader.get_input_embeddings())
        path = next(name for name, module in backbone.named_modules() if module is table)
        opened = OpenTable(backbone, table, checkpoint, paths, files, weights, f"{path}.weight", _tied(backbone))
        if opened.tensor_of(opened.source_of(opened.name)) is None:
            raise UserError(
                f"model.name_or_path is {config.name_or_path!r}, whose input table {opened.name} is not one tensor of "
                "a file"
            )
        values: dict[str, nn.Parameter] = {}
        for name in opened.tied[opened.name]:
            # The checkpoint decides what is tied, as in loading: see `adept_ds.backbone.streaming`.
            source = opened.source_of(name)
            if source not in values:
                values[source] = nn.Parameter(opened.read(source).to(DTYPES[config.dtype]), requires_grad=False)
            layer, _, attribute = name.rpartition(".")
            backbone.get_submodule(layer)._parameters[attribute] = values[source]
        backbone.hub_revision = cached_commit(config.name_or_path, config.revision)  # type: ignore[assignment]
        yield opened


def stored_dtype(config: ModelConfig) -> str:
    """The precision that the checkpoint's input table is stored in, in the words of `model.dtype`.

    Raises:
        UserError: As `open_table`.
    """
    with open_table(config) as opened:
        stored = {"F64": "fp32", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
        return stored[opened.type_name]


def row_scale(table: nn.Embedding) -> float:
    """The factor by which the layer multiplies its rows, as Gemma's does; 1 in most.

    Raises:
        UserError: It does something else to them.
    """
    probe = copy.copy(table)
    probe._parameters = dict(table._parameters)
    probe.weight = nn.Parameter(torch.ones(2, table.embedding_dim, dtype=table.weight.dtype), requires_grad=False)
    probe.weight[1], probe.padding_idx = 2, None
    with torch.no_grad():
        one, two = probe(torch.arange(2)).float()
    if not (torch.equal(one, one[:1].expand_as(one)) and torch.equal(two, 2 * one)):
        raise UserError(f"{type(table).__name__} does something to its rows that is no multiplication by a number")
    return float(one[0])


def _tied(backbone: nn.Module) -> dict[str, list[str]]:
    """Name of each parameter to all names of it."""
    names: dict[int, list[str]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: alike for alike in names.values() for name in alike}

"""Where in a backbone's layers a method goes to work.

Layers are named by the ends of their modules' names, as in `method.target_modules`: `q_proj` stands for every module
whose name is `q_proj` or ends in `.q_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adept_ds.errors import UserError


@dataclass(frozen=True)
class Family:
    """Names of the layers of backbones that are built alike."""

    low_rank: tuple[str, ...]
    """Projections that get a low-rank pair in the paper."""
    keys_values: tuple[str, ...]
    """Projections to keys and values; where one makes queries too, it is that one."""
    attention_output: tuple[str]
    """Last projection of the self-attention."""
    feed_forward_output: tuple[str]
    """Last projection of the feed-forward part."""


FAMILIES = {
    "T5": Family(("q", "v"), ("k", "v"), ("SelfAttention.o",), ("DenseReluDense.wo",)),
    "Llama": Family(("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj"), ("self_attn.o_proj",), ("mlp.down_proj",)),
    "CodeGen": Family(("qkv_proj",), ("qkv_proj",), ("attn.out_proj",), ("mlp.fc_out",)),
    "GPT-2": Family(("c_attn",), ("c_attn",), ("attn.c_proj",), ("mlp.c_proj",)),
}
"""Those of the paper, by the best-known member. Another may lack some of the layers, as Mixtral has Llama's in the
attention alone."""

_QUERIES_VALUES, _KEYS_VALUES, _FUSED = ("q_proj", "v_proj"), ("k_proj", "v_proj"), ("query_key_value",)
OTHER_FAMILIES = {
    "Phi-3": Family(("qkv_proj",), ("qkv_proj",), ("self_attn.o_proj",), ("mlp.down_proj",)),
    "BART": Family(_QUERIES_VALUES, _KEYS_VALUES, ("self_attn.out_proj",), ("fc2",)),
    "Phi": Family(_QUERIES_VALUES, _KEYS_VALUES, ("self_attn.dense",), ("mlp.fc2",)),
    "StarCoder2": Family(_QUERIES_VALUES, _KEYS_VALUES, ("self_attn.o_proj",), ("mlp.c_proj",)),
    "GPT-Neo": Family(_QUERIES_VALUES, _KEYS_VALUES, ("attn.attention.out_proj",), ("mlp.c_proj",)),
    "GPT-J": Family(_QUERIES_VALUES, _KEYS_VALUES, ("attn.out_proj",), ("mlp.fc_out",)),
    "GPT-NeoX": Family(_FUSED, _FUSED, ("attention.dense",), ("mlp.dense_4h_to_h",)),
    "BLOOM": Family(_FUSED, _FUSED, ("self_attention.dense",), ("mlp.dense_4h_to_h",)),
    "Persimmon": Family(_FUSED, _FUSED, ("self_attn.dense",), ("mlp.dense_4h_to_h",)),
    "MPT": Family(("Wqkv",), ("Wqkv",), ("attn.out_proj",), ("ffn.down_proj",)),
}
"""The rest: where HF PEFT has chosen layers for a model type, its choice goes before these."""


def family_of(backbone: PreTrainedModel, families: Mapping[str, Family] | None = None) -> Family | None:
    """Return the family that the backbone's self-attention is of, rather one whose feed-forward parts it has, too; None
    if it is of none."""
    alike = []
    for family in (FAMILIES | OTHER_FAMILIES if families is None else families).values():
        if not missing_ends(backbone, (*family.low_rank, *family.keys_values, *family.attention_output)):
            alike.append(family)
    whole = [family for family in alike if layers_named(backbone, family.feed_forward_output)]
    return next(iter(whole or alike), None)


def layers_named(backbone: PreTrainedModel, ends: Collection[str]) -> dict[str, nn.Module]:
    """Return the modules whose names have one of the ends, by name."""
    dotted = tuple(f".{end}" for end in ends)
    return {name: module for name, module in backbone.named_modules() if f".{name}".endswith(dotted)}


def missing_ends(backbone: PreTrainedModel, ends: Collection[str]) -> list[str]:
    """Return those of the ends that no module's name has."""
    return [end for end in ends if not layers_named(backbone, [end])]


def output_layers(backbone: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the last projections of self-attention and feed-forward part of all layers, by name.

    Raises:
        UserError: They are not those of a family.
    """
    family = family_of(backbone)
    parts = [family.attention_output, family.feed_forward_output] if family else []
    # Where only some layers have a feed-forward part of this name, the adapters of the others would be missing.
    if len({len(layers_named(backbone, ends)) for ends in parts}) != 1:
        raise UserError(
            "bottleneck adapters stand behind the attention and the feed-forward part of each layer, which are known "
            f"by name in backbones built like {', '.join(FAMILIES | OTHER_FAMILIES)}; {described(backbone)}. Methods "
            "lora and ia3 can be told by method.target_modules which layers to change"
        )
    return layers_named(backbone, [end for ends in parts for end in ends])


def feed_forward_layers(backbone: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the last projections of the feed-forward parts among `output_layers`, by name."""
    family = family_of(backbone)
    return layers_named(backbone, family.feed_forward_output) if family else {}


def embedding_table(backbone: PreTrainedModel) -> nn.Embedding:
    """Return the input embedding; trained parameters are put on the device of its weight."""
    return cast(nn.Embedding, backbone.get_input_embeddings())


def linear_layers(backbone: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the linear layers by name, all but the LM head."""
    head = backbone.get_output_embeddings()
    return {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def described(backbone: PreTrainedModel) -> str:
    """Say for a message what kind of backbone it is, and which layers it has."""
    ends = dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(backbone))
    return (
        f"{backbone.config.name_or_path!r} (model type {backbone.config.model_type!r}) has linear layers whose names "
        f"end in {', '.join(ends)}"
    )


def layer_index(name: str) -> int | None:
    """Number of the layer that the module of this name is in; None if it is in none."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def norms(backbone: PreTrainedModel) -> dict[str, nn.Module]:
    """The layer norms (RMS norms too) by name."""
    return {name: module for name, module in backbone.named_modules() if "norm" in type(module).__name__.lower()}


@contextmanager
def seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Draw from torch's own generator inside the block, which libraries do, seeded like `generator`; after it the state
    is as it was before."""
    with torch.random.fork_rng(devices=[]):
        if generator is not None:
            torch.manual_seed(generator.initial_seed())
        yield

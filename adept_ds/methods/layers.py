"""Where in a backbone's layers a method goes to work."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adept_ds.errors import UserError


@dataclass(frozen=True)
class LayerNames:
    """Ends of the names of a family's modules."""

    low_rank: tuple[str, ...]
    """Projections that get a low-rank pair in the paper."""
    keys_values: tuple[str, ...]
    """Projections to keys and values; where one makes queries too, it is that one."""
    attention_output: str
    """Last projection of the self-attention."""
    feed_forward_output: str
    """Last projection of the feed-forward part."""


_FAMILIES = (
    LayerNames(("q", "v"), ("k", "v"), "SelfAttention.o", "DenseReluDense.wo"),  # T5 and its like
    LayerNames(("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj"), "self_attn.o_proj", "mlp.down_proj"),  # Llama
    LayerNames(("qkv_proj",), ("qkv_proj",), "attn.out_proj", "mlp.fc_out"),  # CodeGen
    LayerNames(("c_attn",), ("c_attn",), "attn.c_proj", "mlp.c_proj"),  # GPT-2
)


def layer_names(backbone: PreTrainedModel) -> LayerNames:
    """Return the names of the family whose layers the backbone has.

    Raises:
        UserError: It has those of none.
    """
    names = [name for name, _ in backbone.named_modules()]
    for family in _FAMILIES:
        outputs = (f".{family.attention_output}", f".{family.feed_forward_output}")
        if all(any(name.endswith(output) for name in names) for output in outputs):
            return family
    raise UserError(
        f"{backbone.config.name_or_path!r} ({backbone.config.model_type}) has layers whose parts this method does not "
        "know by name; expected a backbone built like T5, Llama, CodeGen or GPT-2, or, where the method has it, "
        "method.target_modules"
    )


def linear_layers(backbone: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the linear layers by name, all but the LM head."""
    head = backbone.get_output_embeddings()
    return {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def layer_index(name: str) -> int | None:
    """Number of the layer that the module of this name is in; None if it is in none."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def norms(backbone: PreTrainedModel) -> dict[str, nn.Module]:
    """The layer norms (RMS norms too) by name."""
    return {name: module for name, module in backbone.named_modules() if "norm" in type(module).__name__.lower()}

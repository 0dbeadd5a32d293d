"""Narrow copies of a backbone's layers: the same kind of layer, with every width divided by one factor.

They come from the backbone's own class, built from its own config with smaller numbers in it, so that no architecture
is written out here. Their values are those that the class draws, or what is left of the backbone's when its smallest
rows and columns are cut away.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from adept_ds.backbone.frozen_linear import FrozenLinear
from adept_ds.backbone.load import unsharded_creation
from adept_ds.backbone.sharding import gathered
from adept_ds.errors import UserError
from adept_ds.methods.layers import embedding_table, seeded

_WIDTHS = (
    *("hidden_size", "intermediate_size", "head_dim", "ffn_dim", "ffn_hidden_size", "word_embed_proj_dim"),
    *("d_model", "d_ff", "d_kv", "n_embd", "n_inner", "rotary_dim"),
)
"""Fields of configs that are divided; those of the heads' number stay."""
_LAST_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f")
_FLEX_WIDTH = 16
"""Narrower heads have no kernel in torch's flex attention."""
_CACHE_NUMBERS = ("layer_idx", "layer_id")
"""Attributes of modules by which they find their layer of a cache."""
_PAIRED_HALVES = ("llama", "mistral", "qwen2", "smollm3")
"""Model types whose layers are Llama's by name, and whose heads turn the two halves of their features as pairs."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def block_list(stack: nn.Module) -> nn.ModuleList | None:
    """Return the layers of an encoder or decoder, if it holds them in one list."""
    return next((child for child in stack.children() if isinstance(child, nn.ModuleList)), None)


def last_norm(stack: nn.Module) -> nn.Module | None:
    """Return the layer norm behind the layers of an encoder or decoder, if it is known by name."""
    return next((child for name, child in stack.named_children() if name in _LAST_NORMS), None)


def refusal(backbone: PreTrainedModel) -> str | None:
    """Why there can be no narrow copy of this backbone's layers; None if there can."""
    config = backbone.config
    stacks = [backbone.get_decoder(), *([backbone.get_encoder()] if config.is_encoder_decoder else [])]
    if getattr(config, "num_attention_heads", None) is None:
        return "it has no attention heads, whose number a narrow copy keeps"
    if any(hasattr(module, "A_log") for module in backbone.modules()):
        return "it has state-space layers, whose sizes are not those of attention"
    if any(getattr(config, name, None) for name in _EXPERTS):
        return "it is a mixture of experts, whose router has no narrow form"
    if config.is_encoder_decoder and not all(hasattr(stack, "block") for stack in stacks):
        return "it is an encoder-decoder model that is not built like T5"
    if any(block_list(stack) is None or last_norm(stack) is None for stack in stacks):
        return "its layers are not one list with a layer norm behind them"
    if getattr(config, "kv_lora_rank", None):
        return "its keys and values come from a low-rank pair, whose rank is no multiple of a head's width"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(one, dict) for one in rope.values()) else [rope]
    for one in kinds:
        if one.get("rope_type") == "longrope" or "mrope_section" in one:
            return "its rotary positions have a number for each feature of a head, of which a narrow one has fewer"
    return None


def narrow_config(config: PreTrainedConfig, reduction: int, layers: Sequence[int]) -> PreTrainedConfig:
    """Return the config of a model with every width divided by `reduction`, of as many layers as `layers` names.

    Raises:
        UserError: A width cannot be divided, or a head's width with rotary positions comes out odd.
    """
    narrow: Any = copy.deepcopy(config)
    depth = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if name in _WIDTHS and isinstance(value, int):
            _check_divisible(config, name, value, reduction)
            setattr(narrow, name, value // reduction)
        elif isinstance(value, list) and len(value) == depth:  # a value for each layer
            setattr(narrow, name, [value[layer] for layer in layers])
    heads = config.num_attention_heads
    own_width = getattr(config, "d_kv", None) or getattr(config, "head_dim", None)
    if own_width is None:
        _check_divisible(config, "the width of a head", config.hidden_size // heads, reduction)
    width = (own_width or config.hidden_size // heads) // reduction
    if getattr(config, "rope_parameters", None) and width % 2:
        raise UserError(
            f"method.reduction is {reduction}, and {config.name_or_path!r} turns the features of a head in pairs: "
            f"{width * reduction} features leave {width}; expected a divisor that leaves an even number"
        )
    if config._attn_implementation == "flex_attention" and width < _FLEX_WIDTH:
        raise UserError(
            f"model.attn_implementation is 'flex_attention', which needs heads of {_FLEX_WIDTH} features; "
            f"method.reduction {reduction} leaves {width} of {config.name_or_path!r}; expected another attention"
        )
    narrow.num_hidden_layers = len(layers)
    if config.is_encoder_decoder:
        narrow.num_decoder_layers = len(layers)
    narrow.vocab_size, narrow.pad_token_id = 1, None
    narrow._attn_implementation = config._attn_implementation
    return narrow


def _check_divisible(config: PreTrainedConfig, name: str, value: int, reduction: int) -> None:
    if value % reduction:
        divisors = [str(number) for number in range(2, 65) if value % number == 0]
        raise UserError(
            f"method.reduction is {reduction}, and {name} of {config.name_or_path!r} is {value}, which it does not "
            f"divide; expected one of {', '.join(divisors) or 1}"
        )


def narrow_copy(
    backbone: PreTrainedModel, reduction: int, layers: Sequence[int], generator: torch.Generator | None
) -> PreTrainedModel:
    """Return a model of the backbone's class in fp32 with narrow layers, which start as the class draws them.

    Its tables have one row. The caches' numbers of its layers follow those of the backbone's.

    Raises:
        UserError: As `narrow_config`; or the class does not take the numbers.
    """
    config = narrow_config(backbone.config, reduction, layers)
    try:
        with seeded(generator), unsharded_creation():
            narrow: PreTrainedModel = type(backbone)(config).requires_grad_(True)
    except (ValueError, RuntimeError, AssertionError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"method.reduction is {reduction}: layers of {backbone.config.name_or_path!r} (model type "
            f"{backbone.config.model_type!r}) cannot be built so narrow ({str(error).splitlines()[0]}); expected a "
            "smaller divisor, or another method"
        ) from error
    depth = len(block_list(backbone.get_decoder()))  # type: ignore[arg-type]
    for module in narrow.modules():
        for name in _CACHE_NUMBERS:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, getattr(module, name) + depth)
    return narrow


def can_be_pruned(backbone: PreTrainedModel) -> bool:
    """Whether `prune` knows the backbone's layers."""
    if not backbone.config.is_encoder_decoder:
        return backbone.config.model_type in _PAIRED_HALVES
    stacks = [backbone.get_encoder(), backbone.get_decoder()]
    return all(hasattr(stack, "block") and hasattr(stack.block[0].layer[0], "SelfAttention") for stack in stacks)


@torch.no_grad()
def prune(backbone: PreTrainedModel, narrow: PreTrainedModel, reduction: int, layers: Sequence[int]) -> None:
    """Give a narrow copy the backbone's largest values, of the layers in `layers`; for backbones that `can_be_pruned`.

    As published for T5 (Sung et al. 2022, version 2 of their pruning, with the weights as the measure): of the columns
    of the embedding table those with the largest sums are kept. Then, matrix after matrix in the order of the forward
    pass, the inputs are what was kept last, and of the outputs those rows are kept whose sums of magnitudes are
    largest; of matrices with the same inputs, of the product of the matrices. There the decoder's cross-attention reads
    the encoder by what was kept in the decoder; here by what was kept last in the encoder.

    Where heads turn pairs of features, rows are chosen head by head; see `_rows_of_heads`.

    Every matrix of the backbone is looked at, one at a time: gathered, or expanded. Collective where they are sharded.
    """
    table = embedding_table(backbone).weight
    with gathered([table]):
        sums = torch.linalg.vector_norm(table, 1, dim=0, dtype=torch.float32)
    kept = of_encoder = _largest(sums, reduction)
    stacks: list[tuple[Any, Any]] = [(backbone.get_decoder(), narrow.get_decoder())]
    if backbone.config.is_encoder_decoder:
        # The decoder's first layer takes the encoder's last indices too, as published.
        stacks.insert(0, (backbone.get_encoder(), narrow.get_encoder()))
    for wide_stack, stack in stacks:
        wide_blocks: Any = block_list(wide_stack)
        blocks: Any = block_list(stack)
        for number, wide in enumerate(wide_blocks):
            values, kept = _pruned_block(wide, kept, of_encoder, reduction)
            if number not in layers:
                continue
            block = blocks[layers.index(number)]
            for name, value in values.items():
                block.get_parameter(name).copy_(value)
            if _has_bias_table(block):
                source = wide if _has_bias_table(wide) else wide_blocks[0]
                bias = source.layer[0].SelfAttention.relative_attention_bias.weight
                with gathered([bias]):
                    block.layer[0].SelfAttention.relative_attention_bias.weight.copy_(bias)
        wide_norm: Any = last_norm(wide_stack)
        norm: Any = last_norm(stack)
        with gathered([wide_norm.weight]):
            norm.weight.copy_(wide_norm.weight[kept])
        of_encoder = kept


def _has_bias_table(block: Any) -> bool:
    return hasattr(block, "layer") and block.layer[0].SelfAttention.has_relative_attention_bias


def _parts(block: Any) -> list[tuple[str, str, list[str], str]]:
    """A layer's parts in the order of the forward pass: names of the norm, of the part, of its first matrices and of
    its last one."""
    if not hasattr(block, "layer"):
        return [
            ("input_layernorm", "self_attn", ["q_proj", "k_proj", "v_proj"], "o_proj"),
            ("post_attention_layernorm", "mlp", ["gate_proj", "up_proj"], "down_proj"),
        ]
    parts = []
    for number, part in enumerate(block.layer):
        name = next(name for name, _ in part.named_children() if name not in ("layer_norm", "dropout"))
        ends = [end for end, child in part.get_submodule(name).named_children() if isinstance(child, nn.Linear)]
        last = "wo" if "wo" in ends else "o"
        first = [end for end in ends if end != last]
        parts.append((f"layer.{number}.layer_norm", f"layer.{number}.{name}", first, last))
    return parts


def _pruned_block(block: Any, kept: Tensor, of_encoder: Tensor, reduction: int) -> tuple[dict[str, Tensor], Tensor]:
    """What is left of a layer that reads the features `kept`, by name; and the features that it writes."""
    values: dict[str, Tensor] = {}
    for norm, name, first, last in _parts(block):
        values[f"{norm}.weight"] = _entries(block.get_submodule(norm).weight, kept)
        part = block.get_submodule(name)
        reads_encoder = name.endswith("EncDecAttention")
        inputs = [of_encoder if reads_encoder and end in ("k", "v") else kept for end in first]
        cut = [_columns(part.get_submodule(end), chosen) for end, chosen in zip(first, inputs, strict=True)]
        if name == "self_attn":
            rows, read = _rows_of_heads(cut, part.head_dim, reduction)
        else:
            read = _largest(math.prod(cut[1:], start=cut[0]).abs().sum(1), reduction)
            rows = [read] * len(first)
        out = _columns(part.get_submodule(last), read)
        kept = _largest(out.abs().sum(1), reduction)
        for end, matrix, chosen in zip([*first, last], [*cut, out], [*rows, kept], strict=True):
            values[f"{name}.{end}.weight"] = matrix[chosen]
            bias = part.get_submodule(end).bias
            if bias is not None:
                values[f"{name}.{end}.bias"] = _entries(bias, chosen)
    return values, kept


def _rows_of_heads(cut: Sequence[Tensor], width: int, reduction: int) -> tuple[list[Tensor], Tensor]:
    """Rows of q, k and v, each [its heads x width, in], that are kept, and columns of the matrix behind them.

    Features i and i + width / 2 of a head are turned as a pair, the faster the smaller i is. In the place of every
    `reduction` neighbouring pairs a narrow head has one: that with the largest product of q and k, the same in all
    heads that share keys. Of v, the features with the largest sums are kept.
    """
    q, k, v = cut
    count, group = len(k) // width, len(q) // len(k)
    product = q.view(count, group, 2, width // 2, -1) * k.view(count, 1, 2, width // 2, -1)
    bands = product.abs().sum((1, 2, 4)).view(count, -1, reduction)
    pairs = bands.argmax(-1) + reduction * torch.arange(bands.shape[1], device=q.device)
    turned = torch.cat([pairs, pairs + width // 2], -1)
    features = v.view(count, width, -1).abs().sum(-1).topk(width // reduction).indices.sort().values

    def of(chosen: Tensor, heads: int) -> Tensor:
        starts = width * torch.arange(count * heads, device=q.device).view(count, heads, 1)
        return (starts + chosen[:, None]).flatten()

    return [of(turned, group), of(turned, 1), of(features, 1)], of(features, group)


def _entries(vector: Tensor, chosen: Tensor) -> Tensor:
    """Those entries of a parameter in fp32 [chosen]."""
    with gathered([vector]):
        return vector[chosen].float()


def _columns(layer: nn.Linear, chosen: Tensor) -> Tensor:
    """Those columns of a layer's weight in fp32 [out, chosen]."""
    with gathered([layer.weight]):
        weight = layer.dense_weight() if isinstance(layer, FrozenLinear) else layer.weight
        return weight[:, chosen].float()


def _largest(values: Tensor, reduction: int) -> Tensor:
    """Indices of the largest 1 / `reduction` of the values [n], in ascending order."""
    return values.topk(len(values) // reduction).indices.sort().values

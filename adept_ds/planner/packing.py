"""Whether examples may stand one behind another in a row: told before any weight is loaded, by trying it.

A model of the backbone's kind is built with random weights: its layers in miniature, few of them, all that says how
they attend as it is. It reads examples alone and packed, and beside other neighbours. Where their losses differ,
something goes from one example to the next: a recurrent state, positions that are counted from the row's beginning, or
attention that does not heed positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from adept_ds.backbone.load import unsharded_creation
from adept_ds.config.run import RunConfig
from adept_ds.data.encode import Encoded, collate, collate_packed, longest_example
from adept_ds.errors import UserError
from adept_ds.formats import FORMATS
from adept_ds.methods import create_method
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.model.loss import IGNORE_INDEX

TOLERANCE = 1e-3
"""Of an example's loss; rounding is some 1e-6 of it, and what a neighbour changes a tenth."""
_VOCABULARY = 64
_MOST_LAYERS = 8
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_INNER_SIZES = (
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
)
_STAND_IN = "flash_stand_in"


def check_packing(run: RunConfig, architecture: PreTrainedConfig) -> None:
    """Refuse to pack what cannot be packed exactly.

    Raises:
        UserError: An example may be longer than a row; the model has an encoder; or one example has an effect on the
            next one, or that could not be found out.
    """
    row_size = run.train.packing
    if row_size is None:
        return
    if architecture.is_encoder_decoder:
        raise UserError(
            f"train.packing is for causal models; the encoder of {run.model.name_or_path!r} (model type "
            f"{architecture.model_type!r}) attends in both directions, with positions that are counted from the row's "
            "beginning or told by no argument; leave train.packing out"
        )
    length = run.method.num_virtual_tokens
    longest, _ = longest_example(run.data, length, encoder_decoder=False)
    if longest > row_size:
        keys = f"data.max_length is {run.data.max_length}"
        if FORMATS[run.data.format].has_tasks:
            keys = (
                "data.max_source_length and data.max_target_length, or those of the tasks, and "
                f"method.num_virtual_tokens come to {longest}"
            )
        raise UserError(
            f"train.packing is {row_size}, the tokens of a row, and {keys}, so an example might not fit into one; "
            f"expected train.packing of at least {longest}, or shorter examples"
        )
    try:
        reason = _found_out(run, architecture)
    except UserError:
        raise
    except Exception as error:
        reason = (
            "a small model of its kind could not be tried "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]})"
        )
    if reason:
        attention = run.model.attn_implementation or "as transformers chooses"
        raise UserError(
            f"train.packing: {run.model.name_or_path!r} (model type {architecture.model_type!r}, attention "
            f"{attention}) cannot be trained on packed rows as on single ones: {reason}; leave train.packing out"
        )


@torch.no_grad()
def _found_out(run: RunConfig, architecture: PreTrainedConfig) -> str | None:
    """Why packed rows are not single ones to this kind of model; None if they are."""
    generator = torch.Generator().manual_seed(0)

    def example(length: int, learnt: bool) -> Encoded:
        ids = torch.randint(3, _VOCABULARY, (length,), generator=generator).tolist()
        return Encoded(ids, ids if learnt else [IGNORE_INDEX] * length, False, False, False, 0)

    with _flash_on_any_device(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = _small_model(run, architecture)
        own, others = example(9, learnt=True), [example(7, learnt=False) for _ in range(4)]

        def loss(rows: list[list[Encoded]]) -> float:
            batch = collate_packed(rows, 2 * (model.num_virtual_tokens + 12), model.num_virtual_tokens, 0)
            return float(model(**batch, reduction="sum").loss)

        alone = float(model(**collate([own], 0), reduction="sum").loss)
        first, second = loss([others[:1], [others[1], own]]), loss([others[2:3], [others[3], own]])
        in_front = loss([[own, others[0]], []])
    if not alone > 0:
        return "the loss of a small model of its kind is none"
    if abs(first - second) > TOLERANCE * alone:
        return "what an example's neighbour is changes its loss"
    if max(abs(first - alone), abs(in_front - alone)) > TOLERANCE * alone:
        return "an example behind another one has another loss than alone"
    return None


def _small_model(run: RunConfig, architecture: PreTrainedConfig) -> AdaptedModel:
    """The run's method in a small model of its backbone's kind, in fp32, all weights random."""
    wanted = run.model.attn_implementation
    is_flash = is_flash_attention_requested(requested_attention_implementation=wanted)
    with unsharded_creation():
        # Flex attention takes the same positions from the same code as sdpa.
        backbone = AutoModelForCausalLM.from_config(
            small_architecture(architecture),
            dtype=torch.float32,
            attn_implementation=wanted if wanted in ("eager", "sdpa") else None,
            trust_remote_code=False,
        )
        model = AdaptedModel(backbone, create_method(run.method), seed=None).eval()
    if is_flash:
        backbone.config._attn_implementation = _STAND_IN
    for tensor in [*model.parameters(), *model.method.constants().values()]:
        if tensor.dim() > 1:
            tensor.normal_(0, tensor.shape[-1] ** -0.5)
    return model


def small_architecture(architecture: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config of the same kind with few tokens, layers and heads, and with narrow layers.

    Heads keep their width, on which rotary positions depend, and layers their kinds.
    """
    small = copy.deepcopy(architecture)
    text: Any = small.get_text_config()
    layers: int = text.num_hidden_layers
    per_layer = {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == layers}
    kept = min(layers, _MOST_LAYERS)
    while any(not _has_all(value, kept) for value in per_layer.values()):
        kept += 1
    for name, value in per_layer.items():
        setattr(text, name, value[:kept])
    text.num_hidden_layers = kept
    width, heads = text.hidden_size, getattr(text, "num_attention_heads", None)
    if heads:
        key_name = next((name for name in _KEY_HEADS if getattr(text, name, None)), None)
        share = heads // getattr(text, key_name) if key_name else 1
        head_width = getattr(text, "head_dim", None) or width // heads
        # Four at least: CodeGen's weights lie in four parts.
        key_heads = max(1, min(4, heads) // share)
        text.num_attention_heads = key_heads * share
        if key_name:
            setattr(text, key_name, key_heads)
        narrow = head_width * key_heads * share
        for name, value in vars(text).items():
            if isinstance(value, int) and value == width:
                setattr(text, name, narrow)
    for name in _INNER_SIZES:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), 64))
    text.vocab_size = _VOCABULARY
    for number, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        if getattr(text, name, None) is not None:
            setattr(text, name, number)
    return small


def _has_all(values: list[Any], count: int) -> bool:
    return all(value in values[:count] for value in values[count:])


@contextmanager
def _flash_on_any_device() -> Iterator[None]:
    """Have an attention by the name of `_STAND_IN` that computes what flash attention does with what it is told."""
    ALL_ATTENTION_FUNCTIONS[_STAND_IN] = _attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_STAND_IN]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally, within the sequences that end at `cu_seq_lens_q` if it is given."""
    index = torch.arange(key.shape[2])
    distance = index[-query.shape[2] :, None] - index
    is_seen = distance >= 0
    if sliding_window is not None:
        is_seen &= distance < sliding_window
    if cu_seq_lens_q is not None:
        sequence = torch.bucketize(index, cu_seq_lens_q, right=True)
        is_seen &= sequence[:, None] == sequence
    groups = query.shape[1] // key.shape[1]
    keys, values = repeat_kv(key, groups), repeat_kv(value, groups)
    output = F.scaled_dot_product_attention(query, keys, values, attn_mask=is_seen, scale=scaling)
    return output.transpose(1, 2).contiguous(), None

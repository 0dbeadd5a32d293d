"""From text to token ids, with every truncation counted, and from examples to padded tensors.

Soft-prompt ids are not added here; the limits leave room for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from adept_ds.config import DataConfig
from adept_ds.data.records import Example
from adept_ds.errors import UserError
from adept_ds.loss import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    Causal: `input_ids` are prompt and target, `labels` the same with -100 on the prompt. Encoder-decoder: `input_ids`
    are the prompt, `labels` the target.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_truncated: bool
    target_truncated: bool
    encoder_decoder: bool


def encode_prompt(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    num_virtual_tokens: int,
    encoder_decoder: bool,
) -> tuple[list[int], bool]:
    """Return the ids that a completion is generated from, and whether they were truncated.

    At most `max_prompt_length - num_virtual_tokens` ids; a longer prompt is cut from the left, its BOS stays in front
    and, for an encoder-decoder model, its EOS at the end. BOS is added if the tokenizer does so, and never twice.
    Raises UserError for a chat example if the tokenizer has no chat template.
    """
    ids = _chat_ids(example, tokenizer) if example.chat else _prompt_ids(example.prompt, tokenizer)
    if encoder_decoder:
        ids = [*ids, _eos(tokenizer)]
    limit = cfg.max_prompt_length - num_virtual_tokens
    if len(ids) <= limit:
        return ids, False
    head = [id for id in ids[:1] if id == tokenizer.bos_token_id]
    return head + ids[len(ids) - limit + len(head) :], True


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    num_virtual_tokens: int,
    encoder_decoder: bool,
) -> Encoded:
    """Return the ids and labels of an example: the prompt as `encode_prompt`, then target and EOS without a BOS.

    Causal: prompt and target have at most `max_length - num_virtual_tokens` ids; encoder-decoder: the target has at
    most `max_length - max_prompt_length`. A longer target is cut from the right and then has no EOS, so that the
    model does not learn to stop at the cut. Raises UserError if the target has no token.
    """
    prompt, prompt_truncated = encode_prompt(example, tokenizer, cfg, num_virtual_tokens, encoder_decoder)
    target = list(tokenizer(example.target, add_special_tokens=False)["input_ids"])
    if not target:
        raise UserError(f"{example.task_id}: the target {example.target!r} has no token for this tokenizer")
    target.append(_eos(tokenizer))
    if encoder_decoder:
        limit = cfg.max_length - cfg.max_prompt_length
    else:
        limit = cfg.max_length - num_virtual_tokens - len(prompt)
    target, target_truncated = target[:limit], len(target) > limit
    if encoder_decoder:
        return Encoded(prompt, target, prompt_truncated, target_truncated, True)
    return Encoded(prompt + target, [IGNORE_INDEX] * len(prompt) + target, prompt_truncated, target_truncated, False)


def _prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # Whether the tokenizer puts BOS in front is seen on a text; a trailing EOS of its own is not taken over.
    bos = [id for id in tokenizer("a")["input_ids"][:1] if id == tokenizer.bos_token_id]
    return ids if ids[: len(bos)] == bos else bos + ids


def _chat_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.chat_template is None:
        raise UserError(
            f"data.format mbpp-instruct needs a chat template, and the tokenizer {tokenizer.name_or_path!r} has none; "
            "expected an instruction-tuned model's tokenizer, or data.format mbpp-paper or mbpp"
        )
    turn = [{"role": "user", "content": example.prompt}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, which ends every target")
    return tokenizer.eos_token_id


class EncodedDataset:
    """The encoded examples of a split, with their lengths and the number of truncated prompts and targets."""

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        cfg: DataConfig,
        num_virtual_tokens: int,
        encoder_decoder: bool,
        show_progress: bool = False,
    ) -> None:
        """Encode all examples. Raises UserError if there is none, or one without a target token."""
        if not examples:
            raise UserError(f"no examples to encode (data.format {cfg.format}, data.path {cfg.path})")
        bar = tqdm(examples, desc="tokenising", disable=not show_progress)
        self.encoded = [encode(example, tokenizer, cfg, num_virtual_tokens, encoder_decoder) for example in bar]
        self.lengths = [
            len(example.input_ids) + (len(example.labels) if encoder_decoder else 0) for example in self.encoded
        ]
        self.truncated_prompts = sum(example.prompt_truncated for example in self.encoded)
        self.truncated_targets = sum(example.target_truncated for example in self.encoded)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Encoded:
        return self.encoded[index]

    def summary(self) -> str:
        """Return one line on size, lengths and truncation, for the console and the report."""
        return (
            f"{len(self)} examples, {sum(self.lengths)} tokens (mean {sum(self.lengths) / len(self):.1f}, "
            f"longest {max(self.lengths)}); "
            f"truncated: {self.truncated_prompts} prompts, {self.truncated_targets} targets"
        )


def collate(
    batch: Sequence[Encoded],
    pad_token_id: int,
    padding_side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int = 1,
) -> dict[str, Tensor]:
    """Pad a batch to its longest row, rounded up to a multiple.

    Returns `input_ids`, `attention_mask` [B, S] and `labels` [B, S] (encoder-decoder: [B, T]), all int64; padded
    labels are -100. Labels of an encoder-decoder model are padded on the right whatever the side of the inputs.
    """
    inputs = [row.input_ids for row in batch]
    labels_side = "right" if batch[0].encoder_decoder else padding_side
    return {
        "input_ids": _pad(inputs, pad_token_id, padding_side, pad_to_multiple_of),
        "attention_mask": _pad([[1] * len(ids) for ids in inputs], 0, padding_side, pad_to_multiple_of),
        "labels": _pad([row.labels for row in batch], IGNORE_INDEX, labels_side, pad_to_multiple_of),
    }


def _pad(rows: Sequence[Sequence[int]], value: int, side: str, multiple: int) -> Tensor:
    width = -(-max(map(len, rows)) // multiple) * multiple
    padded = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        padded[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
    return padded

"""Whether what was written computes what the live model computes.

Some prompts (plain, of different lengths and padded on the left, long, and as chats) are continued greedily by the live
model, and by what was written, loaded with plain `transformers` and PEFT. Then both read the live model's texts, and
their logits are compared at every token that was generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from adept_ds.contexts import attribute_set
from adept_ds.errors import UserError
from adept_ds.model.adapted_model import AdaptedModel

NEW_TOKENS = 20
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 1e-2}
"""Largest difference of logits that counts as rounding, as a part of the largest logit."""
PLAIN = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "Once upon a time there was a little girl who",
    "1, 2, 3, 4,",
)
LONG = "In the beginning the river was quiet, and nobody in the village thought of the flood. " * 6
CHATS = ("Write a Python function that reverses a string.", "Who wrote Faust?")


@dataclass(frozen=True)
class Batch:
    """Prompts that are read together, and what the live model made of them."""

    texts: tuple[str, ...]
    is_chat: bool
    rows: list[list[int]]
    """Their token ids, without the soft prompt."""
    written: Tensor
    """What was generated of them, padded on the left [B, T]."""
    logits: Tensor
    """At each of these tokens, of each row alone, fp32 [B, T, V]."""


@dataclass(frozen=True)
class Agreement:
    """How two models compare."""

    prompts: int
    tokens: int
    differing: int
    """Prompts whose greedy texts differ, but for ties."""
    ties: int
    """Prompts whose texts part where the two best tokens are closer than the rounding."""
    logit_difference: float
    """The largest."""
    logit_limit: float
    """What counts as rounding."""
    largest_logit: float

    @property
    def is_same(self) -> bool:
        """Whether what was written computes the same, but for rounding."""
        return self.differing == 0 and self.logit_difference <= self.logit_limit

    def __str__(self) -> str:
        ties = f" ({self.ties} part at a tie)" if self.ties else ""
        return (
            f"{self.differing} of {self.prompts} greedy texts of {self.tokens} tokens differ{ties}; largest difference "
            f"of logits {self.logit_difference:.2g}, of logits up to {self.largest_logit:.3g}"
        )


def chat_ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Token ids of a chat with one question, up to where the answer begins."""
    chat = [{"role": "user", "content": text}]
    ids: Any = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=False, **options
    )
    return list(ids)


def live_batches(
    model: AdaptedModel, tokenizer: PreTrainedTokenizerBase, task: int, most_tokens: int | None
) -> list[Batch]:
    """Return the prompts with what the live model makes of them.

    Args:
        model: In evaluation mode, on any device.
        tokenizer: The backbone's.
        task: Number of the task whose prompt is read, where the model has several.
        most_tokens: Longer prompts are left out; None if there is no limit.
    """
    groups: list[tuple[Sequence[str], bool]] = [((text,), False) for text in PLAIN[:2]]
    groups += [(PLAIN, False), ((LONG,), False)]
    if tokenizer.chat_template:
        groups += [(CHATS, True), (CHATS[:1], True)]
    batches = []
    device = model.backbone.device

    def for_task(function: Callable[..., Any], **inputs: Any) -> Any:
        tasks = torch.full((len(inputs["input_ids"]),), task, device=device)
        return function(**inputs, task_ids=tasks)

    for texts, is_chat in groups:
        rows = [chat_ids(tokenizer, text) if is_chat else tokenizer(text)["input_ids"] for text in texts]
        longest = max(map(len, rows))
        if not all(rows) or (most_tokens is not None and longest > most_tokens):
            continue
        ids, mask = left_padded(rows, tokenizer.pad_token_id or 0)
        written = _greedy(model.backbone, partial(for_task, model.generate), ids.to(device), mask.to(device))
        logits = _logits_after(model.backbone, partial(for_task, model), rows, written)
        batches.append(Batch(tuple(texts), is_chat, rows, written, logits))
    return batches


def left_padded(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask [B, S] of rows of any lengths."""
    width = max(map(len, rows))
    ids = [[padding] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def compare(
    batches: Sequence[Batch],
    model: Any,
    rows_of: Callable[[Batch], list[list[int]]],
    prompt_ids: Sequence[int],
    are_padded: bool = True,
) -> Agreement:
    """Compare a model of `transformers` or PEFT with the live one.

    Where a table has rows to spare, prompt tokens have ids that the live model could write, for nothing. From there on
    a text is not compared.

    Args:
        batches: What the live model did.
        model: The other one.
        rows_of: Gives the ids that it is to read for each prompt of a batch, with the prompt's tokens.
        prompt_ids: The prompt's tokens, which must never be the best.
        are_padded: Whether prompts of a batch are read together, padded on the left, or each alone.
    """
    differing = ties = prompts = 0
    difference = largest = 0.0
    limit = LIMITS[model.dtype]
    for batch in batches:
        rows = rows_of(batch)
        read = [left_padded(some, 0) for some in ([rows] if are_padded else [[row] for row in rows])]
        theirs = torch.cat(
            [_greedy(model, model.generate, ids.to(model.device), mask.to(model.device)) for ids, mask in read]
        )
        their_logits = _logits_after(model, model, rows, batch.written)
        vocabulary = batch.logits.shape[-1]
        real = real_tokens(vocabulary, prompt_ids)
        for row, written in enumerate(batch.written):
            end = comparable(written, real)
            live = batch.logits[row, : end + 1][:, real]
            apart = (their_logits[row, : end + 1][:, real] - live).abs()
            difference = max(difference, float(apart.max()) if torch.isfinite(apart).all() else float("inf"))
            largest = max(largest, float(live.abs().max()))
            prompts += 1
            unequal = (theirs[row, :end] != written[:end]).nonzero().flatten().tolist()
            if unequal:
                first = unequal[0]
                is_even = is_tie(batch.logits[row, first], real, int(theirs[row, first]), limit)
                ties, differing = ties + is_even, differing + (not is_even)
    return Agreement(prompts, NEW_TOKENS, differing, ties, difference, limit * largest, largest)


def real_tokens(vocabulary: int, prompt_ids: Sequence[int]) -> Tensor:
    """Ids that are no prompt token's."""
    return torch.tensor([number for number in range(vocabulary) if number not in set(prompt_ids)])


def comparable(written: Tensor, real: Tensor) -> int:
    """How many of the live model's tokens come before the first that only a prompt token has the id of."""
    without_text = (~torch.isin(written, real)).nonzero().flatten().tolist()
    return int(without_text[0]) if without_text else len(written)


def is_tie(live: Tensor, real: Tensor, other: int, limit: float) -> bool:
    """Whether rounding may choose `other` where the live model has the logits [V].

    Args:
        live: The live model's.
        real: Ids that may be chosen.
        other: Id that was chosen.
        limit: Largest difference that counts as rounding, as a part of the largest logit.
    """
    logits = live[real]
    return other in real and bool(logits.max() - live[other] <= 2 * limit * logits.abs().max())


def _greedy(backbone: Any, generate: Callable[..., Any], ids: Tensor, mask: Tensor) -> Tensor:
    """Generate as many tokens as there are to be [B, T], whatever the checkpoint's own settings are."""
    if isinstance(backbone, PeftModel):
        backbone = backbone.get_base_model()
    start = backbone.generation_config.decoder_start_token_id
    plain = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        decoder_start_token_id=start,
    )
    # What is not given is filled in from the model's own.
    with attribute_set(backbone, "generation_config", plain):
        sequences: Tensor = generate(input_ids=ids, attention_mask=mask, generation_config=plain)
    return sequences[:, -NEW_TOKENS:].cpu()


@torch.no_grad()
def _logits_after(backbone: Any, forward: Callable[..., Any], rows: Sequence[Sequence[int]], written: Tensor) -> Tensor:
    """Logits [B, T, V] of a model that reads each of the rows alone, for each of the tokens `written` [B, T]."""
    logits = []
    for row, before in zip(rows, written[:, :-1], strict=True):
        read = torch.tensor([row], device=backbone.device)
        after = before[None].to(backbone.device)
        if backbone.config.is_encoder_decoder:
            start = torch.full_like(after[:, :1], backbone.generation_config.decoder_start_token_id)
            output = forward(input_ids=read, decoder_input_ids=torch.cat([start, after], 1))
        else:
            output = forward(input_ids=torch.cat([read, after], 1))
        logits.append(output.logits[0, -written.shape[1] :].float().cpu())
    return torch.stack(logits)


def check(agreement: Agreement, what: str) -> None:
    """Refuse what computes something else.

    Raises:
        UserError: It does.
    """
    if not agreement.is_same:
        raise UserError(f"{what} does not compute what the live model does: {agreement}; nothing was written")

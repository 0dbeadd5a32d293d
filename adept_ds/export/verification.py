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
    ids: Tensor
    """[B, S], padded on the left, without the soft prompt."""
    mask: Tensor
    written: Tensor
    """What was generated [B, T]."""
    logits: Tensor
    """At each generated token, fp32 [B, T, V]."""


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
    for texts, is_chat in groups:
        rows = [chat_ids(tokenizer, text) if is_chat else tokenizer(text)["input_ids"] for text in texts]
        longest = max(map(len, rows))
        if not all(rows) or (most_tokens is not None and longest > most_tokens):
            continue
        ids, mask = left_padded(rows, tokenizer.pad_token_id or 0)
        ids, mask = ids.to(model.backbone.device), mask.to(model.backbone.device)
        tasks = torch.full((len(ids),), task, device=ids.device)
        output = _greedy(model.backbone, partial(model.generate, task_ids=tasks), ids, mask)
        batches.append(Batch(tuple(texts), is_chat, ids.cpu(), mask.cpu(), *_taken(output)))
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
    vocabulary: int,
) -> Agreement:
    """Compare a model of `transformers` or PEFT with the live one.

    Args:
        batches: What the live model did.
        model: The other one.
        rows_of: Gives the ids that it is to read for each prompt of a batch, with the prompt's tokens.
        vocabulary: V; tokens from there on must never be the best.
    """
    differing = ties = prompts = 0
    difference = largest = 0.0
    limit = LIMITS[model.dtype]
    for batch in batches:
        ids, mask = left_padded(rows_of(batch), 0)
        output = _greedy(model, model.generate, ids.to(model.device), mask.to(model.device))
        written, _ = _taken(output)
        logits = _logits_after(model, ids.to(model.device), mask.to(model.device), batch.written)
        real = logits[..., :vocabulary]
        largest = max(largest, float(batch.logits.abs().max()))
        apart = (real - batch.logits).abs()
        difference = max(difference, float(apart.max()) if torch.isfinite(apart).all() else float("inf"))
        for row in range(len(written)):
            prompts += 1
            unequal = (written[row] != batch.written[row]).nonzero()
            if not len(unequal):
                continue
            first = int(unequal[0])
            theirs = batch.logits[row, first]
            margin = float(theirs.max() - theirs[min(int(written[row, first]), vocabulary - 1)])
            is_tie = int(written[row, first]) < vocabulary and margin <= 2 * limit * float(theirs.abs().max())
            ties, differing = ties + is_tie, differing + (not is_tie)
    return Agreement(prompts, NEW_TOKENS, differing, ties, difference, limit * largest, largest)


def _greedy(backbone: Any, generate: Callable[..., Any], ids: Tensor, mask: Tensor) -> Any:
    """Generate as many tokens as there are to be, whatever the checkpoint's own settings are."""
    old = backbone.generation_config
    plain = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        decoder_start_token_id=old.decoder_start_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with attribute_set(backbone, "generation_config", plain):
        return generate(input_ids=ids, attention_mask=mask)


def _taken(output: Any) -> tuple[Tensor, Tensor]:
    """Generated tokens [B, T] and the logits that they were chosen by [B, T, V]."""
    logits = torch.stack([step.float() for step in output.logits], 1).cpu()
    written = output.sequences[:, -logits.shape[1] :].cpu()
    return written, logits


@torch.no_grad()
def _logits_after(model: Any, ids: Tensor, mask: Tensor, written: Tensor) -> Tensor:
    """Logits [B, T, rows] by which a model that has read `ids` would choose each of `written` [B, T]."""
    written = written.to(ids.device)
    if model.config.is_encoder_decoder:
        start = torch.full_like(written[:, :1], model.generation_config.decoder_start_token_id)
        before = torch.cat([start, written[:, :-1]], 1)
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=before).logits
        return logits.float().cpu()
    whole = torch.cat([ids, written[:, :-1]], 1)
    whole_mask = torch.cat([mask, torch.ones_like(written[:, :-1])], 1)
    positions = (whole_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=whole, attention_mask=whole_mask, position_ids=positions).logits
    return logits[:, ids.shape[1] - 1 :].float().cpu()


def check(agreement: Agreement, what: str) -> None:
    """Refuse what computes something else.

    Raises:
        UserError: It does.
    """
    if not agreement.is_same:
        raise UserError(f"{what} does not compute what the live model does: {agreement}; nothing was written")

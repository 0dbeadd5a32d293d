"""Text that goes on where other text ends: to token ids and back, and where a generated text ends.

SentencePiece tokenizers put a space in front of a text that they encode, and take one away from the front of what they
decode. A target that goes on with its prompt has neither. Everything that trains on targets or reads what was generated
goes through here, so that the two mean the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import GenerationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("\n", "\n\n", "a", ".", ")")
"""Texts that targets may be encoded behind."""
CONTEXT_TOKENS = 8
"""Tokens before a text that it is decoded behind: more than a character has."""


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text without special tokens. A text that is there often (a label) is tokenised once."""
    distinct = list(dict.fromkeys(texts))
    ids = tokenizer(distinct, add_special_tokens=False, return_attention_mask=False)["input_ids"] if distinct else []
    by_text = dict(zip(distinct, ids, strict=True))
    return [by_text[text] for text in texts]


def puts_space_in_front(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer encodes a text as if a space stood in front of it."""
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer.decode([*ids, *ids], clean_up_tokenization_spaces=False) != "aa"


def tokenise_continuation(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """As `tokenise`, of texts that go on where a prompt ends: what they have behind it in one text.

    A tokenizer that puts a space in front of a text is given each behind another one, whose ids are taken off again.
    """
    if not puts_space_in_front(tokenizer):
        return tokenise(tokenizer, texts)
    continued = tokenise(tokenizer, texts)
    left = set(range(len(texts)))
    for anchor, (before,) in ((anchor, tokenise(tokenizer, [anchor])) for anchor in _ANCHORS):
        numbers = sorted(left)
        behind = tokenise(tokenizer, [anchor + texts[number] for number in numbers])
        for number, ids in zip(numbers, behind, strict=True):
            if ids[: len(before)] == before:  # else the two have a token in common
                continued[number] = ids[len(before) :]
                left.discard(number)
    return continued


class ContinuationDecoder:
    """Gives the text of ids as it goes on with that of the ids before them; special tokens have none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = {*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}

    def __call__(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text of `ids`; nothing may stand before them."""
        plain = [id for id in ids if id not in self._special]
        context = list(before[-CONTEXT_TOKENS:])
        start, whole = self._text(context), self._text([*context, *plain])
        # The context may end within a character, or the tokenizer be one that joins words anew.
        return whole.removeprefix(start) if whole.startswith(start) else self._text(plain)

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig) -> list[int]:
    """Return the ids that end a generated text: the one that ends a target in training, and the backbone's own."""
    own = generation.eos_token_id
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({*own, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def until_end(ids: Sequence[int], ends: Sequence[int], pad_token_id: int | None) -> list[int]:
    """Return generated ids without the first token that ends a text and all behind it, and without padding."""
    kept = list(ids)
    for position, id in enumerate(kept):
        if id in ends:
            return kept[:position]
    while kept and kept[-1] == pad_token_id:  # of a row that was ended by something else than a token
        kept.pop()
    return kept

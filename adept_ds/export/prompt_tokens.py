"""A tokenizer with a token for each vector of a soft prompt, which it puts in front of what it reads.

The tokens' ids are what the tokenizer assigns: T5's and CodeGen's tables have rows to spare, which come first. Plain
text gets the tokens from the tokenizer's post-processor, in front of its start token, where `AdaptedModel` has them. A
chat is tokenised without special tokens by most programs, so there the template begins with them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from adept_ds.errors import UserError

NAME = "<|adept_{}|>"
"""Text of a prompt token."""
TEMPLATE_LENGTH = "adept"
"""Variable of a serving base's chat template: how many prompt tokens a chat begins with."""


@dataclass(frozen=True)
class PromptTokens:
    """The tokens of a soft prompt, in order."""

    names: tuple[str, ...]
    ids: tuple[int, ...]


def add_prompt_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[Tokenizer, PromptTokens]:
    """Return a copy of the tokenizer's core with so many more special tokens, and what they are.

    Raises:
        UserError: The tokenizer has no core of the `tokenizers` library, or gives the new tokens ids of others.
    """
    core = core_of(tokenizer)
    taken = core.get_vocab(with_added_tokens=True)
    first = next(number for number in range(len(taken) + 1) if NAME.format(number) not in taken)
    names = tuple(NAME.format(first + number) for number in range(count))
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    assigned = core.get_vocab(with_added_tokens=True)
    ids = tuple(assigned[name] for name in names)
    if doubled := sorted(set(ids) & set(taken.values())):
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has gaps among its ids and gives new tokens the id "
            f"{doubled[0]}, which another token has; expected ids without gaps"
        )
    return core, PromptTokens(names, ids)


def core_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the tokenizer's core, without truncation and padding.

    Raises:
        UserError: It is written in Python alone.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(core, Tokenizer):
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) has no tokenizer.json, which "
            "prompt tokens are added to; expected a tokenizer of the tokenizers library"
        )
    core = Tokenizer.from_str(core.to_str())
    core.no_padding()
    core.no_truncation()
    return core


def with_prompt_in_front(core: Tokenizer, prompt: PromptTokens) -> Tokenizer:
    """Return the core with a post-processor that puts the prompt before everything else, start tokens too.

    Raises:
        UserError: Its post-processor is of a kind that is not known.
    """
    values = json.loads(core.to_str())
    values["post_processor"] = _prefixed(values["post_processor"], prompt)
    return Tokenizer.from_str(json.dumps(values))


def _prefixed(processor: dict[str, Any] | None, prompt: PromptTokens) -> dict[str, Any]:
    kind = processor["type"] if processor else None
    if processor is None:
        return _with_pieces(_template([[_sequence("A")], [_sequence("A"), _sequence("B")]], {}), prompt)
    if kind == "TemplateProcessing":
        return _with_pieces(processor, prompt)
    if kind in ("BertProcessing", "RobertaProcessing"):
        return _with_pieces(_template_of_pairs(processor), prompt)
    if kind == "Sequence":
        steps = list(processor["processors"])
        # Each step sees what the one before gave; a second template would take its pieces for a pair of texts.
        for number, step in enumerate(steps):
            if step["type"] != "ByteLevel":
                steps[number] = _prefixed(step, prompt)
                return {**processor, "processors": steps}
        return {**processor, "processors": [*steps, _prefixed(None, prompt)]}
    if kind == "ByteLevel":  # it changes offsets alone
        return {"type": "Sequence", "processors": [processor, _prefixed(None, prompt)]}
    raise UserError(f"the tokenizer's post-processor is of the kind {kind!r}, which a prompt cannot be put in front of")


def _template(parts: list[list[dict[str, Any]]], tokens: dict[str, int]) -> dict[str, Any]:
    single, pair = parts
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": _special(tokens)}


def _template_of_pairs(processor: dict[str, Any]) -> dict[str, Any]:
    """BERT's and RoBERTa's processors as templates."""
    (start, start_id), (end, end_id) = processor["cls"], processor["sep"]
    between = [_token(end)] * (2 if processor["type"] == "RobertaProcessing" else 1)
    single = [_token(start), _sequence("A"), _token(end)]
    pair = [_token(start), _sequence("A"), *between, _sequence("B"), _token(end)]
    return _template([single, pair], {start: start_id, end: end_id})


def _with_pieces(template: dict[str, Any], prompt: PromptTokens) -> dict[str, Any]:
    front = [_token(name) for name in prompt.names]
    special = template["special_tokens"] | _special(dict(zip(prompt.names, prompt.ids, strict=True)))
    return {
        **template,
        "single": [*front, *template["single"]],
        "pair": [*front, *template["pair"]],
        "special_tokens": special,
    }


def _special(tokens: dict[str, int]) -> dict[str, Any]:
    return {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in tokens.items()}


def _token(name: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": 0}}


def _sequence(which: str) -> dict[str, Any]:
    return {"Sequence": {"id": which, "type_id": 0}}


def prompted_template(template: str, names: Sequence[str]) -> str:
    """Return a chat template that begins with these tokens."""
    return "".join(names) + template


def adjustable_template(template: str, names: Sequence[str]) -> str:
    """Return a chat template that begins with the first `adept` of these tokens where that is given, else as before."""
    listed = ", ".join(f"'{name}'" for name in names)
    loop = f"{{%- for token in [{listed}][:{TEMPLATE_LENGTH}] %}}{{{{- token }}}}{{%- endfor %}}"
    return f"{{%- if {TEMPLATE_LENGTH} is defined %}}{loop}{{%- endif %}}{template}"

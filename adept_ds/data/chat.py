"""Chats through a tokenizer's chat template: what an answer is given to, and which parts of the text are learnt.

Learnt are the assistant's turns, each with the token that ends it, so that the model learns to stop. Where they stand
is said by the template's own `{% generation %}` mark or, where it has none, by rendering the chat up to each of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from adept_ds.data.continuation import tokenise, tokenise_continuation
from adept_ds.errors import UserError
from adept_ds.formats import ASSISTANT, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]
"""Characters of a text, from the first to before the last."""


class ChatTemplate:
    """The chat template of a tokenizer that has one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template: str = tokenizer.get_chat_template()
        self._has_mark = MARK.search(self._template) is not None
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        longest_first = sorted(special - {""}, key=len, reverse=True)
        self._special = "|".join(map(re.escape, longest_first)) or "(?!)"

    @property
    def how(self) -> str:
        """How the assistant's turns are found, for the user."""
        return "the template's generation mark" if self._has_mark else "rendering the chat up to each of them"

    def prompt(self, messages: Sequence[Message], where: str) -> str:
        """Return the text that an answer to the messages goes on from.

        Raises:
            UserError: The template refuses the messages.
        """
        return self._render(messages, where, add_generation_prompt=True)

    def turn_end(self) -> int | None:
        """Return the id of the token that ends an assistant's turn; None if the template writes none, or cannot be
        asked."""
        try:
            text, spans = self.learnt((Message("user", "a"), Message(ASSISTANT, "b")), "")
        except UserError:
            return None
        found = re.search(f"({self._special})\\s*$", text[slice(*spans[-1])])
        return cast(int, self._tokenizer.convert_tokens_to_ids(found[1])) if found and found[1] else None

    def learnt(self, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
        """Return the text of a chat and the spans of it that are learnt.

        A chat that the template ends with no token of its own ends with EOS.

        Raises:
            UserError: The template refuses the messages, or what it writes for a turn depends on later ones.
        """
        text, spans = self._marked(messages, where) if self._has_mark else self._compared(messages, where)
        first, last = spans[-1]
        if last == len(text.rstrip()) and not re.search(f"({self._special})$", text[:last]):
            text = text[:last] + (self._tokenizer.eos_token or "")
            spans[-1] = (first, len(text))
        return text, spans

    def _marked(self, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
        """Text and spans by the template's mark, each with the token that ends the turn if the mark leaves it out."""
        with _refusals_told(where):
            # `apply_chat_template` gives the mask in tokens, which it loses where a marked part begins with a space.
            rendered: Any = render_jinja_template(
                [_as_dicts(messages)],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **cast(dict[str, Any], self._tokenizer.special_tokens_map),
            )
        (text,), (marked,) = rendered
        answers = sum(message.role == ASSISTANT for message in messages)
        if len(marked) != answers:
            raise UserError(
                f"{where}: the tokenizer's chat template marks {len(marked)} parts as the assistant's, and the chat "
                f"has {answers} of its turns; expected {{% generation %}} around each of them"
            )
        spans = []
        for first, last in marked:
            ends = None
            if not re.search(f"({self._special})\\s*$", text[first:last]):
                ends = re.compile(f" *({self._special})").match(text, last)
            spans.append((first, ends.end() if ends else last))
        return text, spans

    def _compared(self, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
        """Text and spans by rendering the chat up to each answer, and up to its end without the space after it."""
        text = self._render(messages, where)
        spans = []
        for number, message in enumerate(messages):
            if message.role != ASSISTANT:
                continue
            until = self._render(messages[: number + 1], where)
            before = self.prompt(messages[:number], where) if number else until.partition(message.content.strip())[0]
            if not (text.startswith(until) and until.startswith(before)):
                raise UserError(
                    f"{where}: what the tokenizer's chat template writes for turn {number + 1} of {len(messages)} "
                    "depends on the turns after it, so it cannot be told which part is learnt; expected a template "
                    "with {% generation %} marks, or chats with one answer"
                )
            spans.append((len(before), len(until.rstrip())))
        return text, spans

    def _render(self, messages: Sequence[Message], where: str, add_generation_prompt: bool = False) -> str:
        with _refusals_told(where):
            text = self._tokenizer.apply_chat_template(
                _as_dicts(messages), add_generation_prompt=add_generation_prompt, tokenize=False
            )
        return str(text)


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


@contextmanager
def _refusals_told(where: str) -> Iterator[None]:
    try:
        yield
    except TemplateError as error:
        raise UserError(f"{where}: the tokenizer's chat template refuses this chat: {error}") from error
    except Exception as error:  # A template computes, with whatever comes of that.
        raise UserError(
            f"{where}: the tokenizer's chat template fails on this chat ({type(error).__name__}: {error}); mend it, or "
            "name another tokenizer by model.tokenizer"
        ) from error


def tokenise_learnt(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> Iterator[list[tuple[list[int], bool]]]:
    """Yield each text's tokens in pieces, each piece with whether it is learnt.

    A text is tokenised as a whole, unless a token would lie across the edge of a span: then in pieces, as it is when an
    answer is generated.
    """
    offsets: list[Any] = [None] * len(texts)
    ids: list[list[int]] = [[]] * len(texts)
    if tokenizer.is_fast:
        batch = tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True
        )
        ids, offsets = batch["input_ids"], batch["offset_mapping"]
    for text, learnt, own_ids, own_offsets in zip(texts, spans, ids, offsets, strict=True):
        edges = [edge for span in learnt for edge in span]
        if own_offsets is not None and not any(first < edge < last for first, last in own_offsets for edge in edges):
            flags = [any(start <= first < end for start, end in learnt) for first, _ in own_offsets]
            groups = groupby(zip(own_ids, flags, strict=True), key=itemgetter(1))
            yield [([id for id, _ in group], flag) for flag, group in groups]
        else:
            cuts = [0, *edges, len(text)]
            yield [
                ((tokenise_continuation if first else tokenise)(tokenizer, [text[first:last]])[0], number % 2 == 1)
                for number, (first, last) in enumerate(pairwise(cuts))
                if first < last
            ]

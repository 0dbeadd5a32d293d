"""What is generated for examples: what it goes on from, when it is done, and the answer that it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria

from adept_ds.config import run as settings
from adept_ds.data.continuation import CONTEXT_TOKENS, ContinuationDecoder, end_tokens, until_end
from adept_ds.data.encode import encode_prompts, end_of_answers
from adept_ds.data.tasks import TaskExample
from adept_ds.formats import Example, Problem, stop_at

FENCES = ("```", "~~~")
FENCE_TOKENS = 4
"""A fence has three characters; a fourth token may end a line of tildes."""


class StopStrings(StoppingCriteria):
    """Ends a row once its generated text contains a stop string.

    Args:
        decode: Gives the end of each row; a token has at least one character, so as many tokens as the longest
            stop string has characters are enough, and a few more for characters of several tokens.
        stop: The strings.
        start: Column of the first generated token, the soft prompt not counted.
    """

    def __init__(self, decode: ContinuationDecoder, stop: Sequence[str], start: int) -> None:
        self._decode = decode
        self._stop = stop
        self._start = start
        self._tail = max(map(len, stop)) + 4

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return whether each row is done [B]."""
        return torch.tensor(self.are_done(input_ids.tolist()), device=input_ids.device)

    def are_done(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """As the call, of rows of ids of one length."""
        tails = _texts_from(self._decode, rows, max(self._start, len(rows[0]) - self._tail))
        return [any(stop in tail for stop in self._stop) for tail in tails]


class StopWhenComplete(StoppingCriteria):
    """Ends a row once its answer is complete.

    Args:
        decode: Gives the rows' texts.
        is_complete: For each row, whether its text is a complete answer; None if that is not asked. It is asked only
            when a fence has been written, which alone can close a program.
        start: Column of the first generated token, the soft prompt not counted.
    """

    def __init__(
        self, decode: ContinuationDecoder, is_complete: Sequence[Callable[[str], bool] | None], start: int
    ) -> None:
        self._decode = decode
        self._is_complete = is_complete
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return whether each row is done [B]."""
        return torch.tensor(self.are_done(input_ids.tolist()), device=input_ids.device)

    def are_done(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """As the call, of rows of ids of one length."""
        tails = _texts_from(self._decode, rows, max(self._start, len(rows[0]) - FENCE_TOKENS))
        return [
            is_complete is not None
            and any(fence in tail for fence in FENCES)
            and is_complete(_texts_from(self._decode, [row], self._start)[0])
            for tail, row, is_complete in zip(tails, rows, self._is_complete, strict=True)
        ]


def _texts_from(decode: ContinuationDecoder, rows: Sequence[Sequence[int]], start: int) -> list[str]:
    """Texts of the rows of ids from column `start` on, as they go on with those before it."""
    first = max(0, start - CONTEXT_TOKENS)
    return [decode(row[first:start], row[start:]) for row in rows]


class Answers:
    """What is read for some examples, and how what is generated for them becomes answers, whatever generates it.

    Args:
        tokenizer: The backbone's.
        examples: All that are decoded together.
        config: Decoding.
        data: How prompts are made.
        num_virtual_tokens: Length of the soft prompt, which the limits on prompts leave room for.
        generation: The backbone's own settings, of which the tokens that end a text are taken.
        encoder_decoder: Whether answers stand by themselves, and not behind their prompts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        config: settings.GenerationConfig,
        data: settings.DataConfig,
        num_virtual_tokens: int,
        generation: GenerationConfig,
        encoder_decoder: bool = False,
    ) -> None:
        own_stop = examples[0].stop if isinstance(examples[0], Problem | TaskExample) else ()
        self.stop: Sequence[str] = own_stop if config.stop is None else config.stop
        """Strings that an answer ends before."""
        self.ends = [*end_tokens(tokenizer, generation), *end_of_answers(examples, tokenizer)]
        """Tokens that end one."""
        self.prompts = encode_prompts(examples, tokenizer, data, num_virtual_tokens, encoder_decoder).ids
        """Token ids of each example's prompt."""
        self.decode = ContinuationDecoder(tokenizer)
        self._examples = examples
        self._openings = [_begun_answer(*pair, tokenizer) for pair in zip(examples, self.prompts, strict=True)]
        self._ends_when_complete = config.stop is None
        self._pad_token_id = tokenizer.pad_token_id
        self._encoder_decoder = encoder_decoder

    def is_complete(self, number: int) -> Callable[[str], bool] | None:
        """What says whether a text is the complete answer to an example, behind which nothing is wanted; None if
        answers have no such end."""
        example = self._examples[number]
        if not self._ends_when_complete or not isinstance(example, Problem) or example.continues_prompt:
            return None
        return lambda text: example.answer(self._openings[number] + text).is_complete

    def criterion(self, number: int) -> Callable[[Sequence[int]], bool]:
        """What says of an example's prompt with generated ids behind it whether they are its whole answer.

        Ids that end a text are not looked for.
        """
        is_complete, start = self.is_complete(number), len(self.prompts[number])
        strings = StopStrings(self.decode, self.stop, start) if self.stop else None
        whole = StopWhenComplete(self.decode, [is_complete], start) if is_complete else None

        def is_done(row: Sequence[int]) -> bool:
            return bool((strings and strings.are_done([row])[0]) or (whole and whole.are_done([row])[0]))

        return is_done

    def text(self, number: int, ids: Sequence[int]) -> str:
        """The answer to an example, of ids that were generated until it was there."""
        return self._openings[number] + stop_at(self._whole(number, ids), self.stop)

    def cut_text(self, number: int, ids: Sequence[int]) -> tuple[str, bool]:
        """As `text`, of ids that go on behind the complete answer; and whether there was a stop string."""
        is_complete, prompt = self.is_complete(number), self.prompts[number]
        if is_complete is not None:
            criterion = StopWhenComplete(self.decode, [is_complete], len(prompt))
            row = [*prompt, *until_end(ids, self.ends, self._pad_token_id)]
            lengths = range(1, len(row) - len(prompt) + 1)
            complete = (length for length in lengths if criterion.are_done([row[: len(prompt) + length]])[0])
            ids = ids[: next(complete, len(ids))]
        whole = self._whole(number, ids)
        text = stop_at(whole, self.stop)
        return self._openings[number] + text, len(text) < len(whole)

    def _whole(self, number: int, ids: Sequence[int]) -> str:
        before = [] if self._encoder_decoder else self.prompts[number]
        return self.decode(before, until_end(ids, self.ends, self._pad_token_id))


def _begun_answer(example: Example, prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template has written of an answer with a program: the mark that thinking begins, or nothing.

    It goes in front of the completion, in which thinking that never ends could not be told from the answer without it.
    """
    if not (isinstance(example, Problem) and example.chat):
        return ""
    found = re.search(r"<(?:think|thinking|thought|reasoning)>\s*\Z", tokenizer.batch_decode([list(prompt[-16:])])[0])
    return found[0] if found else ""

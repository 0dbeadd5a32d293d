"""From an answer to the program in it, by one rule for base and chat models, own and others' samples.

1. What is no answer is left out: what a model thinks first (`<think>`), and all behind a chat template's end mark.
2. The answer is cut into blocks. Blocks are fenced as in CommonMark, in a list, a quotation or behind a word as well,
   and a fence within a Python string is a part of the string. Where no fenced block has the program, the blocks are the
   lines of Python that stand between prose.
3. The program is made of the first blocks that define what the tests call and, in turn, what those blocks need.

The first, since a later one may not have been written yet: so an answer is known to be complete, and decoding can end,
as soon as those blocks are closed, and the program does not depend on what would have followed.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from adept_ds.formats.blocks import (
    FENCE,
    PYTHON,
    Block,
    blocks_between_prose,
    fenced_blocks,
    is_meant,
    lone_words,
    unescaped,
    without_prompts,
)
from adept_ds.formats.python_source import body_margin, compiles, names_of

Found = Literal[
    "as it stands", "fenced", "fenced, joined", "fenced, cut", "between prose", "no program", "unfinished thinking"
]
"""How a program stood in its answer; `cut` are the whole statements at the start of a block that was never closed."""


@dataclass(frozen=True)
class Answer:
    """The program in an answer."""

    program: str
    """Source to run. Where there is none, whatever comes nearest to it, so that the verdict is of something written."""
    found: Found
    is_complete: bool = False
    """Whether its blocks are closed and define all that is needed: more text would not change it."""


def find_program(text: str, names: Iterable[str] = ()) -> Answer:
    """Return the program in an answer that holds a whole one.

    Args:
        text: All that was written.
        names: What the tests call; if empty, the program is what defines any function or class.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    text = _WORKED_EXAMPLES_END.split(text, maxsplit=1)[0]
    text = text[max((mark.end() for mark in _WORKED_EXAMPLES_BEGIN.finditer(text)), default=0) :].strip("\n")
    if is_meant(text) and not lone_words(text):
        return Answer(text, "as it stands" if text.strip() else "no program")
    text, is_finished = _without_thinking(text)
    if not is_finished:
        return Answer("", "unfinished thinking")
    text = _END_MARK.split(text, maxsplit=1)[0]
    fenced, prose = fenced_blocks(text)
    names = frozenset(names)
    if chosen := _chosen(fenced, names):
        is_complete = all(block.is_closed and block.has_program for block in chosen) and not _missing(chosen, names)
        return Answer(_joined(chosen), _how_fenced(chosen), is_complete)
    for reading in dict.fromkeys((prose, without_prompts(prose), unescaped(prose), prose.replace("`", "\n"))):
        if chosen := _chosen(list(blocks_between_prose(reading)), names):
            program = _joined(chosen)
            return Answer(program, "as it stands" if program.strip() == text.strip() else "between prose")
    if fenced:
        # Python that defines something else, or Python that does not compile, or what else was fenced.
        nearest = min(fenced, key=lambda block: (not block.is_python, not block.has_program, not block.language))
        is_program = nearest.language in PYTHON or (nearest.is_python and nearest.has_program)
        return Answer(nearest.code, _how_fenced([nearest]) if is_program else "no program")
    return Answer(text.strip("\n"), "no program")


def _how_fenced(blocks: Sequence[Block]) -> Found:
    if any(block.is_cut for block in blocks):
        return "fenced, cut"
    return "fenced" if len(blocks) == 1 else "fenced, joined"


def continue_prompt(prompt: str, text: str, names: Iterable[str] = ()) -> Answer:
    """Return the program that a completion of a signature and docstring makes with its prompt.

    A completion is gone on with to the letter, but for thinking and what stands behind an end mark. Only where that is
    no Python and has a fence, the program is looked for: a whole function goes behind the prompt, whose imports and
    helpers it may use; a body goes into it.
    """
    whole = Answer(prompt + text, "as it stands")
    if compiles(whole.program):
        return whole
    text, is_finished = _without_thinking(text)
    if not is_finished:
        return Answer(prompt, "unfinished thinking")
    text = _END_MARK.split(text, maxsplit=1)[0]
    if compiles(prompt + text) or not FENCE.search(text):
        return replace(whole, program=prompt + text)
    names = frozenset(names)
    answer = find_program(text, names)
    if answer.found != "as it stands" and names & names_of(answer.program).defined:
        behind = f"{prompt.rstrip()}\n\n\n{answer.program}"
        return replace(answer, program=behind if compiles(behind) else answer.program)
    for block in fenced_blocks(text)[0]:
        margin = body_margin(prompt)
        for body in (block.text, textwrap.indent(textwrap.dedent(block.text), margin)):
            if body.strip() and compiles(prompt + body):
                return Answer(prompt + body, "fenced", block.is_closed)
    return whole


_TAG = r"(?:think|thinking|thought|reasoning)"
_THINKING = re.compile(
    rf"^[ \t]*<(?P<tag>{_TAG})>.*?(?:</(?P=tag)>|(?P<open>\Z))|^[ \t]*\[THINK\].*?(?:\[/THINK\]|(?P<open_too>\Z))",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
_END_OF_THINKING = re.compile(
    rf"^[ \t]*(?:</{_TAG}>|\[/THINK\])|(?:</{_TAG}>|\[/THINK\])[ \t]*$", re.MULTILINE | re.IGNORECASE
)
"""Without its beginning, where the chat template has written that."""

_END_MARK = re.compile(
    r"(?:<\|(?:im_end|eot_id|eom_id|end|end_of_text|endoftext|end_of_turn|EOT|eos|return)\|>|</s>|<eos>|<end_of_turn>"
    r"|<｜end▁of▁sentence｜>)(?=[ \t]*(?:\n|\Z|<\||<s>|\[INST\]))"
)
"""An end mark that the tokenizer does not know as one. Before other text it may be part of a program's string."""

_WORKED_EXAMPLES_BEGIN = re.compile(r"^[ \t]*\[BEGIN\]", re.MULTILINE)
_WORKED_EXAMPLES_END = re.compile(r"^[ \t]*\[DONE\]|\[DONE\][ \t]*$", re.MULTILINE)
"""The marks around a program in the prompt with worked examples."""


def _without_thinking(text: str) -> tuple[str, bool]:
    """Return what is not thought, and whether thinking has ended."""
    thoughts = list(_THINKING.finditer(text))
    if not thoughts and (end := _END_OF_THINKING.search(text)):
        return text[end.end() :], True
    is_open = any(thought["open"] is not None or thought["open_too"] is not None for thought in thoughts)
    answer = _THINKING.sub("", text)
    return answer, bool(answer.strip()) or not is_open


def _chosen(blocks: Sequence[Block], names: frozenset[str]) -> list[Block]:
    """Return the first blocks that define the names and what those blocks need; none if no block defines a name.

    Blocks in another language count only if none in Python does, and those that do not compile likewise.
    """
    for kind in (
        [block for block in blocks if block.is_python and block.has_program],
        [block for block in blocks if block.has_program],
        blocks,
    ):
        defining: dict[str, int] = {}
        for number, block in enumerate(kind):
            for name in block.names.defined:
                defining.setdefault(name, number)
        any_program = next((block.names.defined for block in kind if block.names.has_definitions), frozenset())
        wanted, taken = list(names or any_program), set()
        while wanted:
            number = defining.get(wanted.pop(), -1)
            if number >= 0 and number not in taken:
                taken.add(number)
                wanted += kind[number].names.needed
        if taken:
            return [kind[number] for number in sorted(taken)]
    return []


def _missing(blocks: Sequence[Block], names: frozenset[str]) -> frozenset[str]:
    """Names that the blocks need, or that are asked of them, and that none of them defines."""
    needed = names.union(*(block.names.needed for block in blocks))
    return needed.difference(*(block.names.defined for block in blocks))


def _joined(blocks: Sequence[Block]) -> str:
    return "\n\n".join(block.code.strip("\n") + "\n" for block in blocks)

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

import ast
import builtins
import html
import keyword
import re
import symtable
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

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
    if _is_meant(text) and not _lone_words(text):
        return Answer(text, "as it stands" if text.strip() else "no program")
    text, is_finished = _without_thinking(text)
    if not is_finished:
        return Answer("", "unfinished thinking")
    text = _END_MARK.split(text, maxsplit=1)[0]
    fenced, prose = _fenced(text)
    names = frozenset(names)
    if chosen := _chosen(fenced, names):
        is_complete = all(block.is_closed and block.has_program for block in chosen) and not _missing(chosen, names)
        return Answer(_joined(chosen), _how_fenced(chosen), is_complete)
    for reading in dict.fromkeys((prose, _without_prompts(prose), _unescaped(prose), prose.replace("`", "\n"))):
        if chosen := _chosen(list(_between_prose(reading)), names):
            program = _joined(chosen)
            return Answer(program, "as it stands" if program.strip() == text.strip() else "between prose")
    if fenced:
        # Python that defines something else, or Python that does not compile, or what else was fenced.
        nearest = min(fenced, key=lambda block: (not block.is_python, not block.has_program, not block.language))
        is_program = nearest.language in _PYTHON or (nearest.is_python and nearest.has_program)
        return Answer(nearest.code, _how_fenced([nearest]) if is_program else "no program")
    return Answer(text.strip("\n"), "no program")


def _how_fenced(blocks: Sequence[_Block]) -> Found:
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
    if compiles(prompt + text) or not _FENCE.search(text):
        return replace(whole, program=prompt + text)
    names = frozenset(names)
    answer = find_program(text, names)
    if answer.found != "as it stands" and names & names_of(answer.program).defined:
        behind = f"{prompt.rstrip()}\n\n\n{answer.program}"
        return replace(answer, program=behind if compiles(behind) else answer.program)
    for block in _fenced(text)[0]:
        margin = body_margin(prompt)
        for body in (block.text, textwrap.indent(textwrap.dedent(block.text), margin)):
            if body.strip() and compiles(prompt + body):
                return Answer(prompt + body, "fenced", block.is_closed)
    return whole


def compiles(source: str) -> bool:
    """Whether a text is Python."""
    return _syntax_error(source) is None


def body_margin(prompt: str) -> str:
    """Return the indentation of the body that a signature and docstring ask for."""
    last = prompt.rstrip().rpartition("\n")[2]
    return last[: len(last) - len(last.lstrip())] or "    "


# What is no answer.

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


# Fences.

_PYTHON = ("py", "python", "pycon", "ipython", "pyi")
_FENCE = re.compile(
    r"^(?P<before>(?:[ \t>*+-]|\d+[.)])*)(?P<fence>`{3,}|~{3,})(?P<info>[^\n`]*)(?:\n|\Z)"
    r"|^(?P<words>(?:(?!```)[^\n])*[^\n`])(?P<behind>`{3,})(?P<language>[ \t]*[\w.+-]*[ \t]*)(?:\n|\Z)"
    r"|(?<!`)(?P<inline>`{3,})(?!`)(?P<inline_code>[^\n]+?)(?<!`)(?P=inline)(?!`)",
    re.MULTILINE,
)
"""A fence at the start of a line or of what a list or a quotation holds; behind words, if at most a language follows;
and a block within a line."""


@dataclass(frozen=True)
class _Block:
    """A part of an answer that may be a part of the program."""

    text: str
    language: str = "python"
    """Lower-case; empty if none is named."""
    is_closed: bool = True
    """False if the text ended before the closing fence."""
    margin: int = 0
    """Column of what holds the block."""
    is_cut: bool = False
    """Whether it is only a part of what was fenced."""

    @cached_property
    def code(self) -> str:
        """The text as the Python that it was meant to be: without what lists, consoles and HTML pages put around it."""
        code = textwrap.dedent(self.text)
        margin = re.compile(rf"^[ \t]{{1,{self.margin}}}", re.MULTILINE) if self.margin else None
        readings: list[Callable[[str], str]] = [
            lambda text: text,
            lambda text: margin.sub("", self.text) if margin else text,
            lambda text: textwrap.dedent(re.sub(r"^[ \t]*>(?!>>) ?", "", self.text, flags=re.MULTILINE)),
            _without_prompts,
            _unescaped,
        ]
        return next((reading(code) for reading in readings if _is_meant(reading(code))), code)

    @property
    def is_python(self) -> bool:
        return self.language in ("", *_PYTHON)

    @cached_property
    def has_program(self) -> bool:
        return bool(self.code.strip()) and compiles(self.code)

    @cached_property
    def names(self) -> Names:
        return names_of(self.code)


_DEEPEST = 2
"""How deep fences are looked for in fences: those of a text in Markdown that is quoted in one."""


def _fenced(text: str, depth: int = 0) -> tuple[list[_Block], str]:
    """Return the fenced blocks, those within blocks that are no Python as well, and the rest of the text."""
    blocks: list[_Block] = []
    rest, at = [], 0
    while opening := _FENCE.search(text, at):
        rest.append(text[at : opening.start()])
        if opening["inline"]:
            language, _, code = opening["inline_code"].strip().partition(" ")
            is_named = language.lower() in _PYTHON
            blocks.append(_Block(code if is_named else opening["inline_code"].strip(), "python" if is_named else ""))
            at = opening.end()
            continue
        rest.append(opening["words"] or "")
        info = opening["info"] if opening["fence"] else opening["language"]
        words = [(word[0], word.start()) for word in re.finditer(r"[A-Za-z]+", info)][:2]
        code_at = next((at for word, at in words if keyword.iskeyword(word)), None)  # Code beside its fence.
        language = words[0][0].lower() if words and words[0][1] != code_at else ""
        start = opening.end() if code_at is None else opening.start("info") + code_at
        end, at, is_closed = _closing(text, start, opening["fence"] or opening["behind"], language)
        block = _Block(text[start:end], language, is_closed, len(opening["before"] or ""))
        inner: list[_Block] = []
        if not block.has_program and language not in _PYTHON and depth < _DEEPEST and _FENCE.search(block.text):
            inner = _fenced(block.text, depth + 1)[0]
        elif not block.has_program and not is_closed and block.is_python:
            # Who forgot the fence may have gone on in prose.
            runs = _between_prose(block.code)
            inner = [replace(run, is_closed=False, is_cut=run.code.strip() != block.code.strip()) for run in runs]
        blocks += inner or [block]
    return blocks, "\n".join([*rest, text[at:]])


def _closing(text: str, start: int, fence: str, language: str) -> tuple[int, int, bool]:
    """Return where a block ends, where the text goes on, and whether a fence closed it."""
    run = f"{fence[0]}{{{len(fence)},}}"
    line = re.compile(rf"^[ \t>]*(?P<fence>{run})[ \t]*$", re.MULTILINE)
    if language not in ("", *_PYTHON):
        found = line.search(text, start)
        return (found.start(), found.end(), True) if found else (len(text), len(text), False)
    # Backticks outside of strings and comments are no Python, wherever they stand; three tildes can be.
    closing = rf"(?:^[ \t>]*)?(?P<fence>{run})" if fence[0] == "`" else line.pattern
    tokens = re.compile(rf"{_STRING_OR_COMMENT}|{closing}", re.MULTILINE | re.DOTALL)
    found = next((token for token in tokens.finditer(text, start) if token["fence"]), None)
    end = found.start() if found else len(text)
    earlier = line.search(text, start, end)
    if earlier and not (found and compiles(textwrap.dedent(text[start:end]))):
        found = earlier  # It does stand in a string, but in one that was never ended.
    if found is None:
        return len(text), len(text), False
    opens_another = re.match(r"[A-Za-z]\w*[ \t]*(?:\n|\Z)", text[found.end() : found.end() + 80])
    return (found.start(), found.start(), False) if opens_another else (found.start(), found.end(), True)


_STRING_OR_COMMENT = (
    r"#[^\n]*|(?P<quotes>\"\"\"|''')(?:\\.|(?!(?P=quotes)).)*(?:(?P=quotes)|\Z)"
    r"|\"(?:\\.|[^\"\\\n])*\"?|'(?:\\.|[^'\\\n])*'?"
)


# Without fences.

_CODE_LINE = re.compile(
    r"(?P<margin>[ \t]*)(?:(?P<definition>(?:async[ \t]+)?def[ \t]+\w+[ \t]*[(\[]|class[ \t]+\w+[ \t]*[:(\[])"
    r"|import[ \t]+\w|from[ \t]+[\w.]+[ \t]+import\b|@\w|\w+[ \t]*(?::[^=\n]+)?=[^=])"
)


_LONGEST_RUN = 1_000
"""In lines. It bounds the time that a text takes which only looks like Python."""


def _between_prose(text: str) -> Iterator[_Block]:
    """Yield the runs of lines that are Python, each as long as it can be.

    A run ends before a line at its margin, never within a function: code that breaks off stays broken.
    """
    lines = text.split("\n")
    # A blank line ends nothing, nor does a bracket that closes one of an earlier line.
    margins = [len(line) - len(line.lstrip()) if re.match(r"\s*[^\s)\]}]", line) else len(text) for line in lines]
    at = 0
    while at < len(lines):
        start = _CODE_LINE.match(lines[at])
        if start is None:
            at += 1
            continue
        margin, limit = len(start["margin"]), min(len(lines), at + _LONGEST_RUN)
        ends = [n for n in range(at + 1, limit) if margins[n] <= margin] + [limit]
        end: int | None = next((n for n in ends[:-1] if margins[n] < margin), limit)
        while end is not None and (mistake := _syntax_error(_dedented(lines[at:end]))) is not None:
            last = at + mistake - 1
            end = max((n for n in ends if n < end and n <= last), default=None)
        if end is None and not start["definition"]:
            at += 1
            continue
        end = end or ends[0]
        while "last" in _lone_words(_dedented(lines[at:end])):
            end -= 1
        yield _Block(_dedented(lines[at:end]).rstrip())
        at = end


def _dedented(lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    return textwrap.dedent(text) if text[:1].isspace() else text


def _lone_words(source: str) -> set[str]:
    """Whether the first or the last statement of several is but a word, such as the role that a template has left."""
    body = _statements(source)
    ends = {"first": body[0], "last": body[-1]} if len(body) > 1 else {}
    return {where for where, end in ends.items() if isinstance(end, ast.Expr) and isinstance(end.value, ast.Name)}


def _without_prompts(text: str) -> str:
    """What was typed into the consoles that a text shows, without the answers; the text itself if it shows none."""
    if not re.search(r"^[ \t]*>>> ", text, re.MULTILINE):
        return text
    typed = re.findall(r"^[ \t]*(?:>>>|\.\.\.)(?: (.*)|$)", text, re.MULTILINE)
    return "\n".join(typed) + "\n"


def _unescaped(text: str) -> str:
    """A text of an HTML page as it is shown, and without the marks of a chat template."""
    return html.unescape(re.sub(r"</?(?:pre|code|p|br)\b[^>\n]*>|<\|\w+\|>", "\n", text)).replace("\xa0", " ")


def _is_meant(source: str) -> bool:
    """Whether a text is Python and not Python by chance, as `x &lt; y` is."""
    by_chance = {"lt", "gt", "amp", "quot"}
    return compiles(source) and not (re.search(r"&\w+;", source) and names_of(source).needed & by_chance)


# Which blocks are the program.


@dataclass(frozen=True)
class Names:
    """What Python defines at its top level, and what it needs from elsewhere."""

    defined: frozenset[str] = frozenset()
    needed: frozenset[str] = frozenset()
    has_definitions: bool = False
    """Whether a function or a class is among them."""


_BUILTIN = frozenset(dir(builtins)) | {"__file__", "__name__"}


def names_of(source: str) -> Names:
    """Names of a source; of one that does not compile the functions and classes that it would define."""
    if not compiles(source):
        return Names(frozenset(re.findall(r"^(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)", source, re.MULTILINE)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        top = symtable.symtable(source, "<answer>", "exec")
    functions = [node for node in _statements(source) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    stubs = {function.name for function in functions if _is_stub(function)}
    defined, needed, has_definitions = set(), set(), False
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            is_bound = symbol.is_assigned() or symbol.is_imported()
            if is_bound and (table is top or symbol.is_declared_global()):
                defined.add(symbol.get_name())
                has_definitions |= symbol.is_namespace() and symbol.get_name() not in stubs
            elif symbol.is_referenced() and (table is top or symbol.is_global()):
                needed.add(symbol.get_name())
    return Names(frozenset(defined - stubs), frozenset(needed - defined - _BUILTIN), has_definitions)


def _is_stub(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it only stands for one that is still to be written."""
    lines = (line.value if isinstance(line, ast.Expr) else line for line in function.body)
    return all(isinstance(line, ast.Pass | ast.Constant) for line in lines)


def _chosen(blocks: Sequence[_Block], names: frozenset[str]) -> list[_Block]:
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


def _missing(blocks: Sequence[_Block], names: frozenset[str]) -> frozenset[str]:
    """Names that the blocks need, or that are asked of them, and that none of them defines."""
    needed = names.union(*(block.names.needed for block in blocks))
    return needed.difference(*(block.names.defined for block in blocks))


def _joined(blocks: Sequence[_Block]) -> str:
    return "\n\n".join(block.code.strip("\n") + "\n" for block in blocks)


def _statements(source: str) -> list[ast.stmt]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source).body if compiles(source) else []


def _syntax_error(source: str) -> int | None:
    """Line of the first mistake, from 1; None if there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # Only compile() refuses a `return` that has slipped out of the function, only parse() what nests too deep.
            compile(source, "<answer>", "exec", dont_inherit=True)
            ast.parse(source)
        except SyntaxError as error:
            return error.lineno or 1
        except (ValueError, MemoryError, RecursionError):
            return 1
    return None

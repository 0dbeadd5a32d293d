"""The parts of an answer that may be a program: fenced blocks, and lines of Python between prose."""

from __future__ import annotations

import ast
import html
import keyword
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from adept_ds.formats.python_source import Names, compiles, line_of_mistake, names_of, statements

PYTHON = ("py", "python", "pycon", "ipython", "pyi")
FENCE = re.compile(
    r"^(?P<before>(?:[ \t>*+-]|\d+[.)])*)(?P<fence>`{3,}|~{3,})(?P<info>[^\n`]*)(?:\n|\Z)"
    r"|^(?P<words>(?:(?!```)[^\n])*[^\n`])(?P<behind>`{3,})(?P<language>[ \t]*[\w.+-]*[ \t]*)(?:\n|\Z)"
    r"|(?<!`)(?P<inline>`{3,})(?!`)(?P<inline_code>[^\n]+?)(?<!`)(?P=inline)(?!`)",
    re.MULTILINE,
)
"""A fence at the start of a line or of what a list or a quotation holds; behind words, if at most a language follows;
and a block within a line."""


@dataclass(frozen=True)
class Block:
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
            without_prompts,
            unescaped,
        ]
        return next((reading(code) for reading in readings if is_meant(reading(code))), code)

    @property
    def is_python(self) -> bool:
        return self.language in ("", *PYTHON)

    @cached_property
    def has_program(self) -> bool:
        return bool(self.code.strip()) and compiles(self.code)

    @cached_property
    def names(self) -> Names:
        return names_of(self.code)


_DEEPEST = 2
"""How deep fences are looked for in fences: those of a text in Markdown that is quoted in one."""


def fenced_blocks(text: str, depth: int = 0) -> tuple[list[Block], str]:
    """Return the fenced blocks, those within blocks that are no Python as well, and the rest of the text."""
    blocks: list[Block] = []
    rest, at = [], 0
    while opening := FENCE.search(text, at):
        rest.append(text[at : opening.start()])
        if opening["inline"]:
            language, _, code = opening["inline_code"].strip().partition(" ")
            is_named = language.lower() in PYTHON
            blocks.append(Block(code if is_named else opening["inline_code"].strip(), "python" if is_named else ""))
            at = opening.end()
            continue
        rest.append(opening["words"] or "")
        info = opening["info"] if opening["fence"] else opening["language"]
        words = [(word[0], word.start()) for word in re.finditer(r"[A-Za-z]+", info)][:2]
        code_at = next((at for word, at in words if keyword.iskeyword(word)), None)  # Code beside its fence.
        language = words[0][0].lower() if words and words[0][1] != code_at else ""
        start = opening.end() if code_at is None else opening.start("info") + code_at
        end, at, is_closed = _closing(text, start, opening["fence"] or opening["behind"], language)
        block = Block(text[start:end], language, is_closed, len(opening["before"] or ""))
        inner: list[Block] = []
        if not block.has_program and language not in PYTHON and depth < _DEEPEST and FENCE.search(block.text):
            inner = fenced_blocks(block.text, depth + 1)[0]
        elif not block.has_program and not is_closed and block.is_python:
            # Who forgot the fence may have gone on in prose.
            runs = blocks_between_prose(block.code)
            inner = [replace(run, is_closed=False, is_cut=run.code.strip() != block.code.strip()) for run in runs]
        blocks += inner or [block]
    return blocks, "\n".join([*rest, text[at:]])


def _closing(text: str, start: int, fence: str, language: str) -> tuple[int, int, bool]:
    """Return where a block ends, where the text goes on, and whether a fence closed it."""
    run = f"{fence[0]}{{{len(fence)},}}"
    line = re.compile(rf"^[ \t>]*(?P<fence>{run})[ \t]*$", re.MULTILINE)
    if language not in ("", *PYTHON):
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


_CODE_LINE = re.compile(
    r"(?P<margin>[ \t]*)(?:(?P<definition>(?:async[ \t]+)?def[ \t]+\w+[ \t]*[(\[]|class[ \t]+\w+[ \t]*[:(\[])"
    r"|import[ \t]+\w|from[ \t]+[\w.]+[ \t]+import\b|@\w|\w+[ \t]*(?::[^=\n]+)?=[^=])"
)


_LONGEST_RUN = 1_000
"""In lines. It bounds the time that a text takes which only looks like Python."""


def blocks_between_prose(text: str) -> Iterator[Block]:
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
        while end is not None and (mistake := line_of_mistake(_dedented(lines[at:end]))) is not None:
            last = at + mistake - 1
            end = max((n for n in ends if n < end and n <= last), default=None)
        if end is None and not start["definition"]:
            at += 1
            continue
        end = end or ends[0]
        while "last" in lone_words(_dedented(lines[at:end])):
            end -= 1
        yield Block(_dedented(lines[at:end]).rstrip())
        at = end


def _dedented(lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    return textwrap.dedent(text) if text[:1].isspace() else text


def lone_words(source: str) -> set[str]:
    """Whether the first or the last statement of several is but a word, such as the role that a template has left."""
    body = statements(source)
    ends = {"first": body[0], "last": body[-1]} if len(body) > 1 else {}
    return {where for where, end in ends.items() if isinstance(end, ast.Expr) and isinstance(end.value, ast.Name)}


def without_prompts(text: str) -> str:
    """What was typed into the consoles that a text shows, without the answers; the text itself if it shows none."""
    if not re.search(r"^[ \t]*>>> ", text, re.MULTILINE):
        return text
    typed = re.findall(r"^[ \t]*(?:>>>|\.\.\.)(?: (.*)|$)", text, re.MULTILINE)
    return "\n".join(typed) + "\n"


def unescaped(text: str) -> str:
    """A text of an HTML page as it is shown, and without the marks of a chat template."""
    return html.unescape(re.sub(r"</?(?:pre|code|p|br)\b[^>\n]*>|<\|\w+\|>", "\n", text)).replace("\xa0", " ")


def is_meant(source: str) -> bool:
    """Whether a text is Python and not Python by chance, as `x &lt; y` is."""
    by_chance = {"lt", "gt", "amp", "quot"}
    return compiles(source) and not (re.search(r"&\w+;", source) and names_of(source).needed & by_chance)

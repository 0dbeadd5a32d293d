"""The documents' code blocks: what stands in front of one says how it is tried.

    (nothing)                   sh, python: run, in a folder that all blocks of a page share
    file: NAME ..               written to files of these names, for the blocks behind it
    output                      each line is in what the block before it has printed; `...` stands for anything
    settings                    a part of a config, which must be right
    new file: PATH              written into a copy of the repository
    in PATH, before: TEXT       put into a file of a copy of the repository, in front of the line with this text
    in PATH, after: TEXT
    status: N                   run, and ends with this status
    not run: REASON             is not tried

as an HTML comment. Blocks of other languages are looked at by nobody.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CODE = ("sh", "python", "json", "jsonl", "csv")
"""Languages of blocks that are tried."""
OTHER = ("text", "mermaid", "bibtex")
MARKS = ("file", "output", "settings", "new file", "in", "status", "not run")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Of its opening fence, from 1."""
    language: str
    text: str
    marks: dict[str, str]
    """Its comments: name to what stands behind it."""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page.

    Raises:
        ValueError: A block has an unknown mark or language, or one that must be tried says nothing of how.
    """
    found = []
    marks: dict[str, str] = {}
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if comment := re.fullmatch(r"<!-- (.*) -->", line.strip()):
            name = next((mark for mark in MARKS if re.match(rf"{mark}(:| |$)", comment[1])), None)
            if name is None:
                raise ValueError(f"{page.name}:{number}: unknown mark {comment[1]!r}")
            marks[name] = comment[1].removeprefix(name).lstrip(": ")
        elif fence := re.fullmatch(r"( *)```(\w*)", line):
            indent, language = fence.groups()
            text = []
            for _, inner in lines:
                if inner == f"{indent}```":
                    break
                text.append(inner.removeprefix(indent))
            block = Block(page, number, language, "\n".join(text) + "\n", marks)
            if language not in CODE + OTHER:
                raise ValueError(f"{block.where}: unknown language {language!r}; expected {', '.join(CODE + OTHER)}")
            found.append(block)
            marks = {}
        elif line.strip():
            marks = {}
    return found


def commands(block: Block) -> list[str]:
    """The command lines of a shell block, each in one piece."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]

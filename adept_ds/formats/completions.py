"""Stop strings, and the repair of an indentation, which the paper's figures need."""

from __future__ import annotations

import re
from collections.abc import Sequence

from adept_ds.formats.python_source import body_margin, compiles

STRING_OR_COMMENT = re.compile(r"#.*|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'")


def stop_at(text: str, stop: Sequence[str]) -> str:
    """Return `text` up to the earliest occurrence of any of the stop strings."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def repair_indentation(prompt: str, completion: str) -> str:
    """Return the completion of a function with its indentation brought in line with the prompt's.

    The second of the two post-processings whose scores the paper's MBPP figures average. `prompt` is a signature and
    docstring; its docstring's indentation is the unit. If prompt and completion compile together, the completion is
    returned as it stands; otherwise every line is put one unit deeper per block that it stands in:

    - the first line is in the function's body, and no line leaves the body;
    - a line is in a new block only after a line that ends with a colon;
    - a line that returns to a depth which no open block has belongs to the nearest open block, the outer one of two.
    """
    if compiles(prompt + completion):
        return completion
    unit = body_margin(prompt)
    # Columns of the open blocks; the body's own is set by its first line.
    columns: list[int] = []
    opens_block, open_brackets = True, 0
    repaired = []
    for line in completion.split("\n"):
        text = line.strip()
        code = STRING_OR_COMMENT.sub("", text).rstrip()
        starts_statement = code != "" and open_brackets == 0
        if starts_statement:
            _place(len(line.expandtabs(4)) - len(line.expandtabs(4).lstrip()), columns, opens_block)
        repaired.append(unit * max(1, len(columns)) + text if text else "")
        open_brackets = max(0, open_brackets + sum(map(code.count, "([{")) - sum(map(code.count, ")]}")))
        if code:
            opens_block = code.endswith(":") and open_brackets == 0
    return "\n".join(repaired)


def _place(column: int, columns: list[int], opens_block: bool) -> None:
    """Change `columns`, those of the open blocks, to those that are open at a statement that starts at `column`."""
    if opens_block and (not columns or column > columns[-1]):
        columns.append(column)
    elif column > columns[-1]:
        # Deeper without a reason: the lines before had lost some of theirs.
        columns[-1] = column
    else:
        nearest = min(range(len(columns)), key=lambda i: abs(columns[i] - column))
        del columns[nearest + 1 :]

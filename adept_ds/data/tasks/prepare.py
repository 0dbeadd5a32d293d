"""What some data sets need done to their columns before a template can show them.

Each function takes a row and returns the columns that it makes or replaces. A task names one in its field `prepare`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex

from adept_ds.errors import UserError
from adept_ds.files import parse_json
from adept_ds.formats.rows import Row


@dataclass(frozen=True)
class Prepare:
    """A function on rows, the columns that it reads, and those that it makes."""

    function: Callable[[Row], Mapping[str, Any]]
    reads: tuple[str, ...]
    makes: tuple[str, ...]


def text(row: Row, column: str) -> str:
    """Return a cell as text: strings as they stand, numbers as Python writes them. UserError for anything else."""
    value = row.get(column, object)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    what = str(value) if isinstance(value, float) else type(value).__name__
    raise UserError(f"{row.where}: {column} must be a text or a number, not {what}")


def texts(row: Row, column: str) -> list[str]:
    """Return a cell of one text or several, at least one.

    Several are a list, SQuAD's object with a list `text`, or, where a cell can hold nothing but text (CSV), a list
    written as JSON. UserError for anything else, and for a list of none.
    """
    value = row.get(column, object)
    if isinstance(value, dict):
        value = value.get("text")
    if isinstance(value, str) and value.startswith("["):
        with suppress(json.JSONDecodeError):  # It may be a text that begins with a bracket.
            value = parse_json(value)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(item, str) for item in values):
        raise UserError(f"{row.where}: {column} must be a text or a list of texts, with one at least")
    return values


def pad_punctuation(string: str) -> str:
    """Put a space on each side of every character but letters, accents, digits and underscores.

    Runs of spaces become one, those at the ends none.
    """
    return " ".join(regex.sub(r"([^\s_\p{L}\p{M}\p{N}])", r" \1 ", string).split())


def padded_question(row: Row) -> dict[str, Any]:
    """Pad question and context; `padded_answers` are the answers as the model is taught to write them."""
    answers = texts(row, "answers")
    return {
        "question": pad_punctuation(text(row, "question")),
        "context": pad_punctuation(text(row, "context")),
        "answers": answers,
        "padded_answers": [pad_punctuation(answer) for answer in answers],
    }


_MULTIRC = ("question", "answer", "paragraph")


def without_html(row: Row) -> dict[str, Any]:
    """Remove the marks of MultiRC's texts: a line break becomes a space, bold marks go."""
    texts = {column: re.sub(r"<br\s*/?>", " ", text(row, column)) for column in _MULTIRC}
    return {column: re.sub(r"</?b>", "", value) for column, value in texts.items()}


def record_passage(row: Row) -> dict[str, Any]:
    """Join ReCoRD's entities, and end a sentence at each `@highlight`, where the passage has not ended it itself."""
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", text(row, "passage"))
    return {
        "passage": passage.replace("\n@highlight\n", ". "),
        "entities": ", ".join(texts(row, "entities")),
        "answers": texts(row, "answers"),
    }


def marked_spans(row: Row) -> dict[str, Any]:
    """Put `*` on both sides of span 1 and `#` on both sides of span 2. Indices count words.

    A span that does not stand where its index says is left unmarked, as in the published preparation.
    """
    first, second = _whole_number(row, "span1_index"), _whole_number(row, "span2_index")
    marked = _mark(text(row, "text"), text(row, "span1_text"), first, "*")
    # The marks around span 1 are two more words in front of what follows it.
    second += 2 * (first < second)
    return {"text": _mark(marked, text(row, "span2_text"), second, "#")}


def _whole_number(row: Row, column: str) -> int:
    value = text(row, column)
    if not value.isdecimal():
        raise UserError(f"{row.where}: {column} must be a whole number, not {value!r}")
    return int(value)


def _mark(string: str, span: str, index: int, mark: str) -> str:
    found = re.match(rf"(?:\S+\s){{{index}}}", string)
    if found is None or not string.startswith(span, found.end()):
        return string
    return f"{found[0]}{mark} {span} {mark}{string[found.end() + len(span) :]}"


def similarity_in_fifths(row: Row) -> dict[str, Any]:
    """Write STS-B's similarity rounded to the nearest 0.2, with one decimal."""
    return {"label": f"{np.round(5 * _number(row, 'label')) / 5:.1f}"}


def similarity_in_tenths(row: Row) -> dict[str, Any]:
    """Write STS-B's similarity rounded to the nearest 0.1, with one decimal."""
    return {"label": f"{np.round(_number(row, 'label'), 1):.1f}"}


def _number(row: Row, column: str) -> float:
    value = text(row, column)
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{row.where}: {column} must be a number, not {value!r}") from None


QUESTION = ("question", "context", "answers")
RECORD = ("passage", "entities", "answers")
SPANS = ("text", "span1_text", "span1_index", "span2_text", "span2_index")

PREPARE = {
    "padded_question": Prepare(padded_question, QUESTION, (*QUESTION, "padded_answers")),
    "without_html": Prepare(without_html, _MULTIRC, _MULTIRC),
    "record_passage": Prepare(record_passage, RECORD, RECORD),
    "marked_spans": Prepare(marked_spans, SPANS, ("text",)),
    "similarity_in_fifths": Prepare(similarity_in_fifths, ("label",), ("label",)),
    "similarity_in_tenths": Prepare(similarity_in_tenths, ("label",), ("label",)),
}

"""Rows of files, and mistakes in them, told with file and line number and several at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adept_ds.errors import UserError, did_you_mean

T = TypeVar("T")

TYPE_NAMES = {str: "a string", list: "a list", int: "a whole number"}
SHOWN_MISTAKES = 10


@dataclass(frozen=True)
class Row:
    """One record and where it stands (`file:line`), for error messages."""

    where: str
    values: Mapping[str, Any]

    def get(self, field: str, kind: type[T]) -> T:
        """Return the field; UserError if it is missing or not of type `kind`."""
        if field not in self.values:
            raise UserError(
                f"{self.where}: no field {field!r}; the record has {', '.join(map(repr, self.values))}"
                + did_you_mean(field, self.values)
            )
        value = self.values[field]
        if not isinstance(value, kind):
            raise UserError(f"{self.where}: {field} must be {TYPE_NAMES[kind]}, not {type(value).__name__}")
        return value

    def get_text(self, field: str) -> str:
        """Return the field as a text with `\\n` line ends; UserError if it is missing, no string, or blank."""
        text = clean_text(self.get(field, str))
        if not text.strip():
            raise UserError(f"{self.where}: {field} is empty")
        return text

    def get_task_id(self) -> str:
        """Return the task id; the original MBPP's bare numbers become `MBPP/n`, as in MBXP and most samples files."""
        if isinstance(self.values.get("task_id"), int):
            return f"MBPP/{self.values['task_id']}"
        return self.get_text("task_id")


def clean_text(text: str) -> str:
    """Return the text with `\\n` line ends."""
    return text.replace("\r\n", "\n").rstrip("\r")


class Mistakes:
    """The mistakes of one source, collected so that they can be told together.

    Args:
        source: File or data set, for the message.
    """

    def __init__(self, source: str | Path) -> None:
        self._source = source
        self._shown: list[str] = []
        self._count = 0

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep the `UserError` that is raised inside."""
        try:
            yield
        except UserError as error:
            self._count += 1
            if len(self._shown) < SHOWN_MISTAKES:
                self._shown.append(str(error))

    def check(self) -> None:
        """Raise UserError with the first ten mistakes and the number of further ones, if there are any."""
        if self._count == 1:
            raise UserError(self._shown[0])
        if self._count:
            more = self._count - len(self._shown)
            lines = [*self._shown, *([f"and {more:,} more"] if more else [])]
            raise UserError("\n  ".join([f"{self._source}: {self._count:,} mistakes", *lines]))


def check_columns(columns: Iterable[str], present: Sequence[str], where: str) -> None:
    """Raise UserError for a column that is not there, with the nearest one that is."""
    for column in columns:
        if column not in present:
            raise UserError(
                f"{where}: no column {column!r}; it has {', '.join(present)}" + did_you_mean(column, present)
            )

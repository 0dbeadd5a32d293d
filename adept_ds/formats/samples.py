"""Samples files of any origin, and which problems they are of.

human-eval   {"task_id": "HumanEval/0", "completion": ...} a line: what follows the prompt, or an answer with a program
EvalPlus     {"task_id": "Mbpp/2", "solution": ...} a line: a whole program
bigcode      [[...], ...], the lists of whole programs of `generations.json`: one list a problem, in the problems' order
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adept_ds.errors import UserError, did_you_mean
from adept_ds.files import parse_json
from adept_ds.formats.row_files import read_each, read_text, suffix_of, whole_characters
from adept_ds.formats.rows import SHOWN_MISTAKES, Mistakes, Row

FIELDS = ("solution", "completion")
"""Where a sample's text stands; of two the first, as in EvalPlus."""


@dataclass(frozen=True)
class Sample:
    """What was written for one task."""

    task_id: str
    completion: str
    is_program: bool = False
    """Whether it is a program without its prompt, also where completions go on with the prompt."""


@dataclass(frozen=True)
class SamplesFile:
    """The samples of a file, under the ids of their problems, and how they were read."""

    samples: list[Sample]
    understood: str
    """Which fields were taken and how ids were mapped, for a person."""


def read_samples(path: str | Path, task_ids: Sequence[str]) -> SamplesFile:
    """Read samples in any of the forms above; further fields are ignored, an empty completion is a sample.

    Args:
        path: JSON lines, JSON or another form that `read_each` takes.
        task_ids: Those of the problems. A sample's may differ from them in case and in the sign before the number, or
            be the number alone where that is clear.

    Raises:
        UserError: As `read_each`, for missing fields, for samples of no problem, and for lists that are not as many as
            the problems.
    """
    if suffix_of(Path(path)) == ".json" and re.match(r"\s*\[\s*\[", text := read_text(path)):
        return _read_lists(path, text, task_ids)
    ids = _TaskIds(task_ids)
    mapped: dict[str, str] = {}
    fields: dict[str, int] = {}

    def sample(row: Row) -> Sample:
        field = next((field for field in FIELDS if field in row.values), None)
        if field is None:
            raise UserError(
                f"{row.where}: no field 'completion' or 'solution'; the record has "
                f"{', '.join(map(repr, row.values))}" + did_you_mean("completion", row.values)
            )
        written = row.values.get("task_id")
        written = str(written) if isinstance(written, int) else row.get_text("task_id")
        task_id = ids.find(written, row.where)
        if task_id != written:
            mapped.setdefault(written, task_id)
        fields[field] = fields.get(field, 0) + 1
        return Sample(task_id, row.get(field, str), is_program=field == "solution")

    samples = read_each(path, sample, repair=True)
    notes = [_counts(samples, task_ids)]
    notes += [
        f"{count:,} {'whole programs' if field == 'solution' else 'completions'} in the field {field!r}"
        for field, count in fields.items()
    ]
    if mapped:
        written, task_id = next(iter(mapped.items()))
        notes.append(f"{len(mapped):,} ids are read as those of the problems, such as {written!r} as {task_id!r}")
    return SamplesFile(samples, f"{path}: {'; '.join(notes)}")


def _read_lists(path: str | Path, text: str, task_ids: Sequence[str]) -> SamplesFile:
    try:
        lists = parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON, {error.msg} (column {error.colno})") from None
    if len(lists) != len(task_ids):
        raise UserError(
            f"{path}: {len(lists):,} lists of programs, and {len(task_ids):,} problems; lists have no task ids, so as "
            "many are expected, in the problems' order (of bigcode's MBPP: --problem_format mbpp --split test)"
        )
    samples: list[Sample] = []
    mistakes = Mistakes(path)
    for at, (task_id, programs) in enumerate(zip(task_ids, lists, strict=True)):
        with mistakes.collected():
            if not isinstance(programs, list) or not all(isinstance(program, str) for program in programs):
                raise UserError(f"{path} [{at}]: expected a list of programs, each a string")
            samples += [Sample(task_id, whole_characters(program), is_program=True) for program in programs]
    mistakes.check()
    if not samples:
        raise UserError(f"{path}: holds no programs")
    about = f"whole programs in lists without ids, the first taken for {task_ids[0]!r}, the last for {task_ids[-1]!r}"
    return SamplesFile(samples, f"{path}: {_counts(samples, task_ids)}; {about}")


def _counts(samples: Sequence[Sample], task_ids: Sequence[str]) -> str:
    have = len({sample.task_id for sample in samples})
    return f"{len(samples):,} samples; {have:,} of the {len(task_ids):,} problems have any"


class _TaskIds:
    """The ids of the problems, found by those that other tools write."""

    def __init__(self, task_ids: Sequence[str]) -> None:
        self._task_ids = task_ids
        self._by_key: dict[tuple[str, str], list[str]] = {}
        for task_id in task_ids:
            name, number = _key(task_id)
            for key in {(name, number), ("", number)}:
                self._by_key.setdefault(key, []).append(task_id)
        self._known = frozenset(task_ids)
        self._unknown = 0

    def find(self, written: str, where: str) -> str:
        """Return the problem's id. UserError if there is none, or more than one."""
        if written in self._known:
            return written
        found = self._by_key.get(_key(written), [])
        if len(found) == 1:
            return found[0]
        problems = f"{len(self._task_ids):,} problems, {self._task_ids[0]!r} .. {self._task_ids[-1]!r}"
        if found:
            raise UserError(f"{where}: task_id {written!r} may be {found[0]!r} or {found[1]!r} of the {problems}")
        self._unknown += 1
        # Only the first mistakes are shown, and to find the nearest of many takes time.
        nearest = did_you_mean(written, self._task_ids) if self._unknown <= SHOWN_MISTAKES else ""
        raise UserError(f"{where}: task_id {written!r} is none of the {problems}{nearest}")


def _key(task_id: str) -> tuple[str, str]:
    """Name and number of an id such as `MBPP/11`; the number is empty if it does not end with one."""
    parts = re.fullmatch(r"(.*?)[/_\- ]*(?:0*(\d+))?", task_id.strip().lower(), re.DOTALL)
    assert parts is not None  # Every text has this form.
    return parts[1], parts[2] or ""

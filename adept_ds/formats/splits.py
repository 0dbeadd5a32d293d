"""Which records of a problem file are of which split."""

from __future__ import annotations

import re
from collections.abc import Sequence

from adept_ds.errors import UserError, did_you_mean
from adept_ds.formats.mbpp import Record

SPLITS = ("train", "validation", "test")
SHOTS = "prompt"
"""The split of the worked examples that few-shot prompts show."""

MBPP_NUMBERS = {SHOTS: range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
# The published few-shot runs take tasks 2, 3, 4; task 1 comes last.
FEW_SHOT_ORDER = (*range(2, 11), 1)

Parts = dict[str, list[Record]]


def halves(records: Sequence[Record]) -> Parts:
    """The first half of the file trains, the rest is the test: the paper's split."""
    half = len(records) // 2
    return {"train": list(records[:half]), "test": list(records[half:])}


def by_mbpp_number(records: Sequence[Record]) -> Parts:
    """MBPP's usual split by task ids: 1-10 worked examples, 11-510 test, 511-600 validation, 601-974 train.

    Raises:
        UserError: A task id is none of MBPP's.
    """
    by_number = {_mbpp_number(record): record for record in records}
    parts = {split: [by_number[n] for n in numbers if n in by_number] for split, numbers in MBPP_NUMBERS.items()}
    parts[SHOTS] = [by_number[n] for n in FEW_SHOT_ORDER if n in by_number]
    return parts


def all_test(records: Sequence[Record]) -> Parts:
    """Nothing is for training."""
    return {"test": list(records)}


def named(records: Sequence[Record]) -> Parts:
    """The split that each record names in its field `split`.

    Raises:
        UserError: A record names none, or an unknown one.
    """
    parts: Parts = {split: [] for split in (SHOTS, *SPLITS)}
    for record in records:
        if record.split not in parts:
            raise UserError(
                f"{record.where}: split is {record.split!r}; expected {', '.join(parts)} in every record or none"
                + did_you_mean(record.split or "", parts)
            )
        parts[record.split].append(record)
    return parts


def _mbpp_number(record: Record) -> int:
    match = re.fullmatch(r"MBPP/(\d+)", record.task_id)
    if match is None or not 1 <= int(match[1]) <= 974:
        raise UserError(
            f"{record.where}: task_id {record.task_id!r} has no place in MBPP's split by task ids 1 to 974; give every "
            "record a field split (prompt, train, validation, test)"
        )
    return int(match[1])

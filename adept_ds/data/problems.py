"""From a problem file (or the bundled problems) to the problems and examples of a split.

How a file is read follows from the record of `data.format` in `adept_ds.formats.registry`. Where a file's records name
their split in a field `split`, that wins. A split that is asked for and that the file does not have is an error, but
for `validation`: it is then empty, or the last `validation_fraction` of `train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from adept_ds.config.run import DataConfig
from adept_ds.data.load_hub import is_hub_id, load_data_set
from adept_ds.data.own import load_own_examples
from adept_ds.data.tasks import Part, load_task_examples
from adept_ds.errors import UserError, did_you_mean
from adept_ds.formats.mbpp import Record, parse_record
from adept_ds.formats.problem_forms import OWN_FORM
from adept_ds.formats.records import Example, Problem
from adept_ds.formats.registry import FORMATS, MBPP_HUB_CONFIG, bundled_problems, names_with_tests
from adept_ds.formats.row_files import read_each
from adept_ds.formats.rows import Row
from adept_ds.formats.splits import SHOTS, named

T = TypeVar("T")


def load_problems(cfg: DataConfig, split: str) -> list[Problem]:
    """Return the problems of a split ("train", "validation", "test") in file order.

    Raises UserError for an unreadable or malformed file, a split that the format or the file does not have, a file
    of the wrong form, and formats that have no tests.
    """
    problem_set = FORMATS[cfg.format].problems
    if problem_set is None:
        raise UserError(
            f"data.format {cfg.format} has no tests to score by; expected one of {', '.join(names_with_tests())}"
        )
    _check_split(split, cfg.format)
    path = cfg.path or problem_set.file()
    records = _read_records(path, problem_set.hub_config)
    has_named = any(record.split is not None for record in records)
    parts = named(records) if has_named else problem_set.parts(records)
    _hold_out(parts, cfg.validation_fraction or 0)
    if not parts.get(split) and split != "validation":
        raise UserError(f"{path}: no record belongs to the split {split!r}")
    few_shot = parts.get(SHOTS, [])
    if cfg.few_shot > len(few_shot):
        raise UserError(
            f"data.few_shot is {cfg.few_shot}, but {path} has {len(few_shot)} examples for it "
            "(task ids 1 to 10, or records of split 'prompt')"
        )
    shots = few_shot[: cfg.few_shot]
    return [problem_set.form.problem(record, shots) for record in parts.get(split, [])]


def load_examples(cfg: DataConfig, split: str) -> Sequence[Example]:
    """Return the examples of a split; for a format with tests these are `load_problems`' problems.

    Raises UserError as `load_problems`, `load_task_examples` and `load_own_examples`.
    """
    if FORMATS[cfg.format].problems:
        return load_problems(cfg, split)
    _check_split(split, cfg.format)
    if FORMATS[cfg.format].has_tasks:
        return load_task_examples(cfg, cast(Part, split))
    return load_own_examples(cfg, split)


def read_problems(path: str | None, format: str | None = None) -> list[Problem]:
    """Return all problems of a file (the bundled ones for None), to score samples of another origin.

    `format`: a `data.format` with tests that the samples were made with; the file's own form if not given. It matters
    only for a file in MBPP's original form whose samples continue a `mbpp-paper` prompt. UserError for another name.
    """
    if format is None:
        records = _read_records(path or bundled_problems(), MBPP_HUB_CONFIG)
        return [OWN_FORM[type(record)].problem(record) for record in records]
    problem_set = FORMATS[format].problems if format in FORMATS else None
    if problem_set is None:
        known = names_with_tests()
        raise UserError(
            f"unknown form {format!r} of problems; expected {', '.join(known)}{did_you_mean(format, known)}"
        )
    records = _read_records(path or problem_set.file(), problem_set.hub_config)
    return [problem_set.form.problem(record) for record in records]


def _read_records(path: str, hub_config: str | None) -> list[Record]:
    if hub_config is not None and (Path(path).is_dir() or is_hub_id(path)):
        records = [parse_record(row) for row in _hub_rows(path, hub_config)]
    else:
        records = read_each(path, parse_record)
    seen: dict[str, str] = {}
    for record in records:
        if record.task_id in seen:
            raise UserError(f"{record.where}: task_id {record.task_id!r} was used before, at {seen[record.task_id]}")
        seen[record.task_id] = record.where
    return records


def _hub_rows(name: str, config: str) -> list[Row]:
    """Rows of all splits of a hub data set, or of a folder laid out like one, by task id."""
    try:
        parts = load_data_set(name, config)
    except UserError as error:
        raise UserError(f"data.path {name!r} is no file. {error}, or give a JSON lines file") from error
    rows: list[dict[str, Any]] = [row for part in parts.values() for row in part]
    return [Row(f"{name}:{row['task_id']}", row) for row in sorted(rows, key=lambda row: row["task_id"])]


def _check_split(split: str, format: str) -> None:
    splits = FORMATS[format].splits
    if split not in splits:
        raise UserError(
            f"unknown split {split!r} of data.format {format}; expected {', '.join(splits)}"
            + did_you_mean(split, splits)
        )


def _hold_out(parts: dict[str, list[T]], fraction: float) -> None:
    train = parts.get("train", [])
    size = round(fraction * len(train))
    if size > 0 and not parts.get("validation"):
        parts["validation"] = train[-size:]
        parts["train"] = train[:-size]

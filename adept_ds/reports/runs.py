"""What run folders hold, as every report reads it.

RUN/config.json             the resolved config
RUN/status.json             how the last try ended, and the validation figure of the best checkpoint
RUN/metrics.jsonl           lines with "step" and "loss", "learning_rate/<group>", "tokens_per_second", "eval/loss", ...
RUN/best/                   what was trained, for its size
RUN/eval/NAME/              an evaluation by running programs
RUN/eval/NAME/TASK/         an evaluation on a text-to-text task
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
from adept_ds.config.method import CONSTANTS
from adept_ds.errors import UserError
from adept_ds.evaluation.results import SUMMARY_NAME, Evaluation, TaskEvaluation, read_evaluations
from adept_ds.files import read_json
from adept_ds.storage.run_folder import CONFIG_NAME, MAY_CHANGE, METRICS_NAME, SEED_KEYS, read_metrics, read_status

BUNDLED = "bundled problems"
IGNORED = (*MAY_CHANGE, "logging", "eval", *SEED_KEYS)
"""Settings that two runs of one group may differ in."""
COUNTED_SPLITS = ("test", None)
"""Splits whose figures are reported; None is a file of problems that has no splits."""


@dataclass(frozen=True)
class RunRecord:
    """One run folder. What is not in the folder is empty."""

    path: Path
    config: dict[str, Any]
    status: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation]

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted settings."""
        return flatten(self.config)

    @property
    def label_smoothing(self) -> float:
        """That of the training loss in `metrics`."""
        return self.settings.get("train.label_smoothing", 0.0)


@dataclass(frozen=True)
class RunFigure:
    """One figure of one run, with all that figures are grouped by."""

    run: Path
    evaluation: Evaluation
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
    def tasks(self) -> int:
        """How many tasks the run was trained on at once."""
        return max(1, len(self.settings.get("data.tasks") or ()))

    @property
    def label(self) -> str:
        """The method, with (m) for a run on several tasks at once: its validation figure is that of all of them, and
        not to be compared with one of a single task."""
        return f"{self.method} (m)" if self.tasks > 1 and self.method != "untuned" else self.method

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


def read_run(path: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: There is no such folder, it holds nothing of a run, or a file in it is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder")
    run = RunRecord(
        path,
        config=read_json(path / CONFIG_NAME) if (path / CONFIG_NAME).is_file() else {},
        status=read_status(path),
        metrics=read_metrics(path / METRICS_NAME) if (path / METRICS_NAME).is_file() else [],
        evaluations=read_evaluations(path / "eval"),
    )
    if not (run.config or run.metrics or run.evaluations):
        raise UserError(f"{path} is not a run folder: it has no {CONFIG_NAME}, {METRICS_NAME} or eval/*/summary.json")
    return run


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Read run folders; a folder of them (a sweep's) stands for all that are in it.

    Raises:
        UserError: A folder is not there or holds no run, or a file is damaged.
    """
    return [read_run(path) for given in paths for path in _run_folders(given)]


def _run_folders(given: Path) -> list[Path]:
    if (given / CONFIG_NAME).is_file() or not given.is_dir():
        return [given]
    found = sorted(path.parent for path in given.glob(f"*/{CONFIG_NAME}"))
    if not found:
        raise UserError(f"{given} is no run folder and holds none: there is no {CONFIG_NAME} in it or in its folders")
    return found


def run_figures(runs: Sequence[RunRecord]) -> tuple[list[RunFigure], list[str]]:
    """Return the figures of the runs' test splits, and a sentence for each thing that is missing or left out."""
    figures: list[RunFigure] = []
    notes: list[str] = []
    for run in runs:
        if run.status.get("state") != "finished":
            notes.append(f"{run.path} is not finished ({run.status.get('state', 'no status.json')}).")
        counted = []
        for evaluation in run.evaluations:
            split = evaluation.protocol.get("split")
            if split in COUNTED_SPLITS:
                counted += _figures(run, evaluation)
            else:
                notes.append(
                    f"{evaluation.answers_path.with_name(SUMMARY_NAME)} is of the split {split!r} and is left out."
                )
        if not counted:
            notes.append(f"{run.path} has no evaluation in eval/.")
        figures += counted
    return figures, notes


def _figures(run: RunRecord, evaluation: Evaluation) -> list[RunFigure]:
    protocol = evaluation.protocol
    is_untuned = evaluation.is_baseline
    settings = {key: value for key, value in run.settings.items() if not (is_untuned and key.startswith("method."))}
    if evaluation.method:
        settings |= flatten({"method": evaluation.method})
    moved = 0.0
    if isinstance(evaluation, TaskEvaluation):
        task = evaluation.task
    else:
        task = BUNDLED if protocol.get("path") == "bundled" else str(protocol.get("format"))
        # Where the paper's mean of two post-processings was asked for, it is what compares with the paper.
        moved = evaluation.paper["average"] - evaluation.pass_at_1.value if evaluation.paper else 0.0
    return [
        RunFigure(
            run=run.path,
            evaluation=evaluation,
            settings=settings,
            model=Path(run.settings.get("model.name_or_path", "unknown")).name,
            method="untuned" if is_untuned else settings.get("method.name", "unknown"),
            task=task,
            variant=protocol.get("variant", ""),
            metric=metric,
            value=figure.value + moved,
            low=figure.low + moved,
            high=figure.high + moved,
            examples=evaluation.examples,
            parameters=0 if is_untuned else count_parameters(run.path / "best"),
            validation=None if is_untuned else run.status.get("best_value"),
        )
        for metric, figure in evaluation.figures.items()
    ]


def count_parameters(folder: Path) -> int | None:
    """Number of trained values in the safetensors files of an adapter or a model; None if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for path in files:
        with safe_open(path, framework="numpy") as tensors:
            trained = set(tensors.keys()) - set(CONSTANTS)
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in trained)
    return total if files else None

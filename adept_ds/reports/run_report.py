"""What a run came to: a learning-curve picture, one self-contained HTML page and a plain-text table.

Reads what the run folder holds and says what it lacks:

    config.json                 the resolved config
    metrics.jsonl               lines with "step" and "loss", "learning_rate/<group>", "tokens_per_second", "eval/loss"
    eval/<name>/summary.json    one evaluation (`Summary`); the one without an adapter is the baseline of the others
    eval/<name>/results.jsonl   its samples: {"task_id", "completion", "program", "status", "kind"}
    eval/<name>/<task>/summary.json    one evaluation on a text-to-text task (`TaskSummary`)

Writes `learning_curve.png` and `report.html` beside them.
"""

from __future__ import annotations

import base64
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adept_ds.errors import UserError
from adept_ds.evaluation.statistics import PairedDifference, paired_difference, problem_scores
from adept_ds.files import atomic_write, read_json
from adept_ds.reports.learning_curve import learning_curve, series
from adept_ds.storage.run_folder import METRICS_NAME, read_metrics

SHOWN_PROBLEMS = 6
AnySummary = TypeVar("AnySummary", bound=BaseModel)


class Interval(BaseModel):
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


class Summary(BaseModel):
    """`summary.json` of one evaluation; further keys are kept and shown."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    name: str
    pass_at_1: Interval = Field(alias="pass@1")
    problems: int
    samples: int
    verdicts: dict[str, int]
    """Samples by verdict; "passed" is one of them."""
    missing: list[str] = []
    """Problems without a sample, which count as failed."""
    adapter: str | None = None
    """Adapter folder; None for the backbone alone."""
    protocol: Any = None
    """Which problems, prompt, decoding and extraction."""
    isolation: Any = None
    """What kept the programs apart from the machine."""


class TaskInterval(BaseModel):
    """A metric with its 95 % confidence interval."""

    value: float
    low: float
    high: float


class TaskSummary(BaseModel):
    """`summary.json` of a text-to-text task; further keys are not looked at."""

    name: str
    protocol: dict[str, Any]
    examples: int
    invalid: int
    """Answers that are no label word, or no number where one is asked for."""
    metrics: dict[str, TaskInterval]

    @property
    def task(self) -> str:
        """The task and, unless it is the test split, the split."""
        split = self.protocol["split"]
        return self.protocol["task"] + ("" if split == "test" else f" ({split})")


@dataclass(frozen=True)
class Evaluation:
    """One folder below `eval/`."""

    summary: Summary
    samples: list[dict[str, Any]]
    """Lines of results.jsonl; empty if the file is missing."""

    def scores(self) -> dict[str, float]:
        """pass@1 of each problem."""
        drawn = Counter(sample["task_id"] for sample in self.samples)
        passed = Counter(sample["task_id"] for sample in self.samples if sample["status"] == "passed")
        scores = problem_scores({task_id: (n, passed[task_id]) for task_id, n in drawn.items()}, k=1)
        return scores | dict.fromkeys(self.summary.missing, 0.0)


@dataclass(frozen=True)
class Comparison:
    """An evaluation with an adapter against the one without."""

    name: str
    baseline: str
    difference: PairedDifference


@dataclass
class Run:
    """Everything found in a run folder."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    tasks: list[TaskSummary] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is missing or could not be compared, one sentence each."""


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: there is no such folder, it holds nothing to report, or a file in it is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder")
    run = Run(path)
    if (path / "config.json").is_file():
        run.config = read_json(path / "config.json")
    else:
        run.notes.append("config.json is missing: the run's settings are not shown.")
    if (path / METRICS_NAME).is_file():
        run.metrics = read_metrics(path / METRICS_NAME)
    if not run.metrics:
        run.notes.append(f"{METRICS_NAME} is missing or empty: there is no learning curve.")
    for summary_path in sorted(path.glob("eval/*/summary.json")):
        run.evaluations.append(_read_evaluation(summary_path, run.notes))
    run.evaluations.sort(key=lambda evaluation: evaluation.summary.adapter is not None)
    run.tasks = [_read_summary(path, TaskSummary) for path in sorted(path.glob("eval/*/*/summary.json"))]
    if not (run.evaluations or run.tasks):
        run.notes.append("eval/ holds no summary.json: the run has not been graded.")
    if not (run.config or run.metrics or run.evaluations or run.tasks):
        raise UserError(f"{path} is not a run folder: it has no config.json, {METRICS_NAME} or eval/*/summary.json")
    _compare(run)
    return run


def write_report(run: Run) -> Path:
    """Write `learning_curve.png` (if there are metrics) and `report.html` to the run folder; return the page's path."""
    picture = None
    if run.metrics:
        picture = learning_curve(run.metrics, title=f"Learning curve of {run.path.resolve().name}")
        with atomic_write(run.path / "learning_curve.png", "wb") as file:
            file.write(picture)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("adept_ds.reports", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("run_report.html.jinja").render(
        run=run,
        name=run.path.resolve().name,
        facts=run_facts(run),
        picture=base64.b64encode(picture).decode() if picture else None,
        verdicts=sorted(
            {verdict for evaluation in run.evaluations for verdict in evaluation.summary.verdicts},
            key=lambda verdict: (verdict != "passed", verdict),
        ),
        problems=_shown_problems(run.evaluations),
        percent=_percent,
        points=_points,
        # Unlike Jinja's own filter, which writes < as \u003c for scripts; here the page's escaping does that.
        as_json=partial(json.dumps, indent=2, ensure_ascii=False),
    )
    with atomic_write(run.path / "report.html") as file:
        file.write(page)
    return run.path / "report.html"


def text_report(run: Run) -> str:
    """The figures as a plain-text table."""
    lines = [str(run.path)]
    width = max((len(evaluation.summary.name) for evaluation in run.evaluations), default=0) + 2
    if run.evaluations:
        lines.append(f"  {'':{width}}{'pass@1':>8}   {'95 % interval':^15}{'problems':>10}{'samples':>9}{'passed':>8}")
    for evaluation in run.evaluations:
        summary = evaluation.summary
        score = summary.pass_at_1
        interval = f"{100 * score.low:5.1f} to {100 * score.high:5.1f}"
        lines.append(
            f"  {summary.name:{width}}{_percent(score.mean):>8}   {interval:^15}"
            f"{summary.problems:>10}{summary.samples:>9}{summary.verdicts.get('passed', 0):>8}"
        )
    lines += [
        f"  {summary.name}, {summary.task}: {metric} {_percent(score.value)} ({100 * score.low:.1f} to "
        f"{100 * score.high:.1f}), {summary.examples} examples, {summary.invalid} invalid"
        for summary in run.tasks
        for metric, score in summary.metrics.items()
    ]
    for comparison in run.comparisons:
        difference = comparison.difference
        lines.append(
            f"  {comparison.name} against {comparison.baseline}: {_points(difference.mean)} points"
            f" ({_points(difference.low)} to {_points(difference.high)}); better on {difference.better} problems,"
            f" worse on {difference.worse}, sign test p = {difference.p_value:.2g}"
        )
    lines += [f"  {label}: {value}" for label, value in training_facts(run).items()]
    lines += [f"  note: {note}" for note in run.notes]
    return "\n".join(lines)


def training_facts(run: Run) -> dict[str, str]:
    """What the metrics say, as label and text."""
    facts: dict[str, str] = {}
    steps, losses = series(run.metrics, "loss")
    if losses:
        facts["training loss"] = f"{losses[0]:.4f} at step {steps[0]}, {losses[-1]:.4f} at step {steps[-1]}"
    steps, losses = series(run.metrics, "eval/loss")
    if losses:
        best = min(range(len(losses)), key=losses.__getitem__)
        facts["best validation loss"] = f"{losses[best]:.4f} at step {steps[best]}"
    for key, label in (("tokens_per_second", "tokens/s"), ("examples_per_second", "examples/s")):
        _, rates = series(run.metrics, key)
        if rates:
            facts[label] = f"{statistics.median(rates):,.1f} (median)"
    return facts


def run_facts(run: Run) -> dict[str, str]:
    """Settings and training figures for the page, as label and text."""
    settings = {
        "model": "model.name_or_path",
        "precision": "model.dtype",
        "method": "method.name",
        "soft prompt length": "method.num_virtual_tokens",
        "bottleneck": "method.bottleneck",
        "data": "data.format",
        "tasks": "data.tasks",
        "batch": "train.global_batch_size",
        "epochs": "train.epochs",
        "ZeRO stage": "deepspeed.zero_optimization.stage",
        "seed": "train.seed",
    }
    prefix = "learning_rate/"
    groups = {key.removeprefix(prefix) for line in run.metrics for key in line if key.startswith(prefix)}
    for group in sorted(groups, reverse=True):
        settings[f"learning rate of the {group.replace('_', ' ')}"] = f"train.learning_rate.{group}"
    facts = {label: value for label, key in settings.items() if (value := _lookup(run.config, key)) is not None}
    shown = {label: ", ".join(value) if isinstance(value, list) else str(value) for label, value in facts.items()}
    return {label: text for label, text in shown.items() if text} | training_facts(run)


def _read_summary(path: Path, kind: type[AnySummary]) -> AnySummary:
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"{path}: {problems}") from error


def _read_evaluation(summary_path: Path, notes: list[str]) -> Evaluation:
    summary = _read_summary(summary_path, Summary)
    if summary.missing:
        notes.append(f"{summary.name}: problems without a sample, counted as failed: {len(summary.missing)}.")
    results_path = summary_path.with_name("results.jsonl")
    if not results_path.is_file():
        notes.append(
            f"eval/{summary_path.parent.name}/results.jsonl is missing: its programs are not shown or compared."
        )
        return Evaluation(summary, [])
    with results_path.open(encoding="utf-8") as file:
        return Evaluation(summary, [json.loads(line) for line in file])


def _compare(run: Run) -> None:
    baseline = next((evaluation for evaluation in run.evaluations if evaluation.summary.adapter is None), None)
    for evaluation in run.evaluations:
        if evaluation.summary.adapter is None:
            continue
        name = evaluation.summary.name
        if baseline is None:
            run.notes.append(f"{name} is compared with nothing: there is no evaluation without an adapter.")
        elif baseline.samples and evaluation.samples:
            try:
                difference = paired_difference(baseline.scores(), evaluation.scores())
            except UserError as error:
                run.notes.append(f"{name} is not compared with {baseline.summary.name}: {error}.")
            else:
                run.comparisons.append(Comparison(name, baseline.summary.name, difference))


def _shown_problems(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """First samples of a few problems in all evaluations, those first whose outcome differs."""
    names, first = [], []
    for evaluation in evaluations:
        if evaluation.samples:
            samples: dict[str, dict[str, Any]] = {}
            for sample in evaluation.samples:
                samples.setdefault(sample["task_id"], sample)
            names.append(evaluation.summary.name)
            first.append(samples)
    common = [task_id for task_id in first[0] if all(task_id in samples for samples in first)] if first else []
    common.sort(key=lambda task_id: len({samples[task_id]["status"] == "passed" for samples in first}) == 1)
    return [
        {
            "task_id": task_id,
            "answers": [{"name": name, **samples[task_id]} for name, samples in zip(names, first, strict=True)],
        }
        for task_id in common[:SHOWN_PROBLEMS]
    ]


def _lookup(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"

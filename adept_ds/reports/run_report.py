"""The report of one run: its figures for the terminal, a self-contained page, a picture of the learning curve.

It says how far each adapter is from the backbone, whether that is beyond the noise, and what both wrote for the same
problems. What the run folder lacks is said too.

RUN/report.html           from `run_report.html.jinja`
RUN/learning_curve.png    if there are metrics
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from adept_ds.evaluation.comparison import (
    Comparison,
    ShownProblem,
    compare_with_baselines,
    problems_text,
    problems_to_show,
)
from adept_ds.evaluation.results import Evaluation, ProgramEvaluation, sorted_verdicts
from adept_ds.files import atomic_write
from adept_ds.reports.learning_curve import learning_curve, series
from adept_ds.reports.pages import write_page
from adept_ds.reports.runs import RunRecord, read_run
from adept_ds.storage.run_folder import CONFIG_NAME, METRICS_NAME

SHOWN_PROBLEMS = 6
"""Problems of each comparison that the page shows."""


@dataclass(frozen=True)
class RunReport:
    """What is reported of a run."""

    run: RunRecord
    evaluations: list[Evaluation]
    """Programs before tasks, those without an adapter before those with one."""
    comparisons: list[Comparison]
    notes: list[str]
    """What is missing or could not be compared, one sentence each."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.run.path.resolve().name


def make_report(path: Path) -> RunReport:
    """Read a run folder and compare its evaluations.

    Raises:
        UserError: There is no such folder, it holds nothing to report, or a file in it is damaged.
    """
    run = read_run(path)
    evaluations = sorted(run.evaluations, key=lambda one: (one.task_label != "", not one.is_baseline))
    comparisons, not_compared = compare_with_baselines(evaluations)
    return RunReport(run, evaluations, comparisons, _missing(run, evaluations) + not_compared)


def _missing(run: RunRecord, evaluations: list[Evaluation]) -> list[str]:
    notes = []
    if not run.config:
        notes.append(f"{CONFIG_NAME} is missing: the run's settings are not shown.")
    if not run.metrics:
        notes.append(f"{METRICS_NAME} is missing or empty: there is no learning curve.")
    for one in evaluations:
        if isinstance(one, ProgramEvaluation) and one.missing:
            notes.append(f"{one.name}: problems without a sample, counted as failed: {len(one.missing)}.")
        if not one.has_answers:
            notes.append(f"{one.answers_path.relative_to(run.path)} is missing: its answers are not shown or compared.")
    if not evaluations:
        notes.append("eval/ holds no summary.json: the run has not been graded.")
    return notes


def write_report(report: RunReport) -> Path:
    """Write the picture (if there are metrics) and the page to the run folder; return the page's path."""
    run = report.run
    picture = None
    if run.metrics:
        picture = learning_curve(run.metrics, f"Learning curve of {report.name}", run.label_smoothing)
        with atomic_write(run.path / "learning_curve.png", "wb") as file:
            file.write(picture)
    path = run.path / "report.html"
    programs = [one for one in report.evaluations if isinstance(one, ProgramEvaluation)]
    write_page(
        "run_report.html.jinja",
        path,
        report=report,
        programs=programs,
        verdicts=sorted_verdicts(*(one.verdicts for one in programs)),
        tasks=[one for one in report.evaluations if one.task_label],
        facts=run_facts(run),
        picture=picture,
        alone=_written_alone(report),
        shown=SHOWN_PROBLEMS,
    )
    return path


def _written_alone(report: RunReport) -> dict[str, list[ShownProblem]]:
    """What evaluations wrote that are compared with nothing, by their names."""
    compared = {(name, one.task) for one in report.comparisons for name in one.names}
    alone = [one for one in report.evaluations if one.has_answers and (one.name, one.task_label) not in compared]
    return {
        f"{one.task_label}: {one.name}" if one.task_label else one.name: problems_to_show({one.name: one.grade(metric)})
        for one in alone
        if (metric := one.example_metric())
    }


def text_report(report: RunReport) -> str:
    """The figures as a plain-text table, the comparisons in words, and a few answers of both sides."""
    lines = [str(report.run.path)]
    width = max((len(one.name) for one in report.evaluations), default=0) + 2
    if not all(one.task_label for one in report.evaluations):
        lines.append(f"  {'':{width}}{'pass@1':>8}   {'95 % interval':^15}{'problems':>10}{'samples':>9}{'passed':>8}")
    for one in report.evaluations:
        if isinstance(one, ProgramEvaluation):
            score = one.pass_at_1
            interval = f"{100 * score.low:5.1f} to {100 * score.high:5.1f}"
            lines.append(
                f"  {one.name:{width}}{100 * score.value:>6.1f} %   {interval:^15}"
                f"{one.examples:>10}{one.samples:>9}{one.verdicts.get('passed', 0):>8}"
            )
        else:
            lines += [
                f"  {one.name}, {one.task_label}: {metric} {100 * score.value:.1f} % ({100 * score.low:.1f} to "
                f"{100 * score.high:.1f}), {one.examples} examples, {one.invalid} invalid"
                for metric, score in one.figures.items()
            ]
    lines += [f"  {comparison.text}" for comparison in report.comparisons]
    lines += [f"  {label}: {value}" for label, value in training_facts(report.run).items()]
    lines += [f"  note: {note}" for note in report.notes]
    for comparison in report.comparisons:
        lines += [f"  {line}".rstrip() for line in problems_text(comparison)]
    return "\n".join(lines)


def training_facts(run: RunRecord) -> dict[str, str]:
    """What the metrics say, as label and text."""
    facts: dict[str, str] = {}
    steps, losses = series(run.metrics, "loss")
    if losses:
        facts["training loss"] = f"{losses[0]:.4f} at step {steps[0]}, {losses[-1]:.4f} at step {steps[-1]}"
        if run.label_smoothing:
            facts["training loss"] += (
                f" (with label smoothing {run.label_smoothing:g}; the validation loss is without, so the two are not "
                "to be compared)"
            )
    steps, losses = series(run.metrics, "eval/loss")
    if losses:
        best = min(range(len(losses)), key=losses.__getitem__)
        facts["best validation loss"] = f"{losses[best]:.4f} at step {steps[best]}"
    for key, label in (("tokens_per_second", "tokens/s"), ("examples_per_second", "examples/s")):
        _, rates = series(run.metrics, key)
        if rates:
            facts[label] = f"{statistics.median(rates):,.1f} (median)"
    return facts


def run_facts(run: RunRecord) -> dict[str, str]:
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
    given = run.settings
    facts = {label: value for label, key in settings.items() if (value := given.get(key)) is not None}
    shown = {label: ", ".join(value) if isinstance(value, list) else str(value) for label, value in facts.items()}
    return {label: text for label, text in shown.items() if text} | training_facts(run)

"""Results of many runs as tables in the paper's layout, with the paper's figures beside them.

Runs that differ in their seeds alone are one measurement. Of several settings of one method on one task, the one with
the best mean validation figure stands in the table: the test figures choose nothing.

Noise. A test set is a sample of examples, and runs are a sample of seeds. With `e` the standard error over examples
(the width of a run's 95 % interval by 2 * 1.96, averaged over the runs: the same examples serve every run, so it does
not shrink with their number) and `s` the standard deviation over `n` seeds, a mean has the standard error

    sqrt(e^2 + s^2 / n)

and its 95 % interval is 1.96 of these to each side, where examples give the two sides of the runs' bootstrap intervals
(so for one run, that interval). A figure of the paper is
taken to have the same `e`, its own `s` over three runs where the paper prints one, and otherwise one run with our `s`.
A difference exceeds the noise if it is larger than 1.96 standard errors of a difference.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from adept_ds.data.tasks.registry import TASKS
from adept_ds.evaluation.comparison import difference_text
from adept_ds.evaluation.results import EXAMPLE_METRICS, PASS_AT_1
from adept_ds.evaluation.statistics import Z95, paired_difference
from adept_ds.reports.paper import PaperColumn, PaperFigures, PaperRow, PaperTable, reproduction
from adept_ds.reports.runs import RunFigure
from adept_ds.storage.run_folder import SEED_KEYS

PAPER_RUNS = 3
"""Runs that the paper's standard deviations are over."""
REFERENCE = "adept"
"""Method that the others are compared with, where it was run."""


@dataclass(frozen=True)
class Measurement:
    """One method with one setting on one task and metric, over its seeds. Figures in percent."""

    figures: tuple[RunFigure, ...]
    settings_tried: int = 1
    """Settings that this one was chosen from, by validation."""

    @property
    def first(self) -> RunFigure:
        """One of the figures, for what they have in common."""
        return self.figures[0]

    @property
    def runs(self) -> int:
        """Number of seeds."""
        return len(self.figures)

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return mean(100 * figure.value for figure in self.figures)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1); None for one."""
        return stdev(100 * figure.value for figure in self.figures) if self.runs > 1 else None

    @property
    def example_error(self) -> float:
        """Standard error over the test examples."""
        return mean(100 * (figure.high - figure.low) for figure in self.figures) / (2 * Z95)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean."""
        return math.hypot(self.example_error, (self.deviation or 0.0) / math.sqrt(self.runs))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean."""
        seeds = Z95 * (self.deviation or 0.0) / math.sqrt(self.runs)
        below = mean(100 * (figure.value - figure.low) for figure in self.figures)
        above = mean(100 * (figure.high - figure.value) for figure in self.figures)
        return self.mean - math.hypot(below, seeds), self.mean + math.hypot(above, seeds)

    @property
    def validation_figures(self) -> list[float]:
        """Validation figures of the best checkpoints, of the runs that have one; in the unit of `eval.metric`."""
        return [figure.validation for figure in self.figures if figure.validation is not None]

    @property
    def validation(self) -> float:
        """Mean validation figure, higher is better; the lowest of all if a run has none."""
        known = self.validation_figures
        if len(known) < self.runs:
            return -math.inf
        return -mean(known) if self.first.lower_is_better else mean(known)

    def noise(self, paper_deviation: float | None) -> float:
        """Half-width of the 95 % interval of the difference to a figure of the paper."""
        paper_seeds = paper_deviation / math.sqrt(PAPER_RUNS) if paper_deviation is not None else self.deviation or 0.0
        return Z95 * math.hypot(self.standard_error, self.example_error, paper_seeds)


@dataclass(frozen=True)
class Cell:
    """A place in a table: our measurement, the paper's figure, both or neither."""

    ours: Measurement | None = None
    paper: float | None = None
    paper_deviation: float | None = None
    our_mean: float | None = None
    """Our figure in percent; of a mean column, the mean over its columns if all of them were measured."""

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's, in points."""
        return None if self.our_mean is None or self.paper is None else self.our_mean - self.paper

    @property
    def noise(self) -> float | None:
        """What a difference must exceed; None where there is none to judge."""
        return None if self.ours is None or self.paper is None else self.ours.noise(self.paper_deviation)

    @property
    def exceeds_noise(self) -> bool | None:
        """Whether the difference is more than noise."""
        return None if self.difference is None or self.noise is None else abs(self.difference) > self.noise

    @property
    def is_other_task(self) -> bool:
        """Whether ours is of a task as it should be, where the paper's is of the published code's form of it."""
        ours = self.ours
        return (
            ours is not None
            and self.paper is not None
            and ours.first.variant == "fixed"
            and ours.first.task in TASKS
            and bool(TASKS[ours.first.task].faithful)
        )


@dataclass(frozen=True)
class Row:
    """One method."""

    label: str
    cells: tuple[Cell, ...]
    section: str = ""
    paper_parameters: str = ""
    quoted_from: str | None = None
    recipe: str = ""
    """What trains it, as words behind `adept-ds train`; of rows of the paper."""

    @property
    def is_run(self) -> bool:
        """Whether any figure is ours."""
        return any(cell.ours for cell in self.cells)

    @property
    def parameters(self) -> tuple[tuple[int, int], ...]:
        """Trained parameters of our runs, and the tasks that share them; several where settings differ between
        columns."""
        figures = [cell.ours.first for cell in self.cells if cell.ours]
        return tuple(sorted({(one.parameters, one.tasks) for one in figures if one.parameters is not None}))


@dataclass(frozen=True)
class Table:
    """One table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    differences: tuple[str, ...] = ()
    """Our methods against one another on the same examples, in words."""
    has_paper: bool = True


def build_tables(figures: Sequence[RunFigure], paper: PaperFigures) -> list[Table]:
    """Return the paper's tables that any figure belongs to, then one a backbone with all that is in none of them."""
    tables, placed = [], set()
    for printed in paper.tables:
        of_backbone = [figure for figure in figures if figure.model.lower() in printed.models]
        table = _paper_table(printed, of_backbone)
        if any(row.is_run for row in table.rows):
            tables.append(table)
            placed |= {_place(cell.ours.first) for row in table.rows for cell in row.cells if cell.ours}
    for model in sorted({figure.model for figure in figures}):
        rest = [figure for figure in figures if figure.model == model and _place(figure) not in placed]
        if rest:
            tables.append(_own_table(model, rest))
    return tables


def _place(figure: RunFigure) -> tuple[Any, ...]:
    return figure.model, figure.label, figure.task, figure.metric, figure.settings.get("data.k_shot")


def measurements(figures: Iterable[RunFigure]) -> list[Measurement]:
    """Put repetitions together. Of several evaluations with the same seeds, the last one counts: a run taken again is
    no further sample."""
    groups: dict[tuple[Any, ...], dict[Any, RunFigure]] = {}
    for figure in figures:
        key = (*_place(figure), figure.variant, figure.group())
        # The backbone alone is the same whichever run it was evaluated beside.
        seeds = None if figure.method == "untuned" else tuple(figure.settings.get(seed) for seed in SEED_KEYS)
        groups.setdefault(key, {})[seeds] = figure
    return [Measurement(tuple(group.values())) for group in groups.values()]


def choose(found: Sequence[Measurement]) -> Measurement | None:
    """Return the setting with the best validation figure; the published form of a task goes before the mended one."""
    if not found:
        return None
    best = max(found, key=lambda one: (one.first.variant == "faithful", one.validation))
    return Measurement(best.figures, len(found))


def _paper_table(printed: PaperTable, figures: Sequence[RunFigure]) -> Table:
    rows = []
    for row in printed.rows:
        of_method = [figure for figure in figures if figure.method == row.method]
        rows.append(_paper_row(printed, row, of_method))
    columns = tuple(column.label for column in printed.columns)
    title = f"Table {printed.number} of the paper: {printed.title} ({printed.backbone})"
    return Table(title, columns, tuple(rows), _differences(rows, columns))


def _paper_row(printed: PaperTable, row: PaperRow, figures: Sequence[RunFigure]) -> Row:
    columns = printed.columns
    ours: dict[str, Measurement | None] = {}
    for column in columns:
        fitting = [figure for figure in figures if _fits(figure, column, row)]
        ours[column.label] = choose(measurements(fitting))
    cells = []
    for index, column in enumerate(columns):
        own = ours[column.label]
        parts = [ours.get(label) for label in column.mean_of]
        known = [part.mean for part in parts if part is not None]
        our_mean = own.mean if own else mean(known) if known and len(known) == len(parts) else None
        deviation = row.deviations[index] if row.deviations else None
        cells.append(Cell(own, row.values[index], deviation, our_mean))
    return Row(row.label, tuple(cells), row.section, row.parameters, row.quoted_from, _recipe(printed, row))


def _recipe(printed: PaperTable, row: PaperRow) -> str:
    config, changes = reproduction(printed, row)
    return shlex.join(["--config", config, *(word for item in changes.items() for word in _flag(*item))])


def _flag(key: str, value: Any) -> tuple[str, str]:
    return f"--{key}", value if isinstance(value, str) else json.dumps(value)


def _fits(figure: RunFigure, column: PaperColumn, row: PaperRow) -> bool:
    starts = figure.settings.get("method.init_from") is not None
    return (
        (figure.task, figure.metric) == (column.task, column.metric)
        and figure.settings.get("data.k_shot") == column.k_shot
        and (figure.tasks > 1) == row.multi_task
        and row.from_source in (None, starts)
        and all(figure.settings.get(key) == value for key, value in (row.settings | column.settings).items())
    )


def _own_table(model: str, figures: Sequence[RunFigure]) -> Table:
    """Methods by task and metric, as they were run."""
    places = list(dict.fromkeys((figure.task, figure.variant, figure.metric, _shots(figure)) for figure in figures))
    columns = tuple(" ".join(part for part in place if part) for place in places)
    methods = sorted({figure.label for figure in figures}, key=lambda name: (name != "untuned", name))
    rows = []
    for method in methods:
        cells = []
        for place in places:
            fitting = [
                figure
                for figure in figures
                if figure.label == method and (figure.task, figure.variant, figure.metric, _shots(figure)) == place
            ]
            own = choose(measurements(fitting))
            cells.append(Cell(own, our_mean=own.mean if own else None))
        rows.append(Row(method, tuple(cells)))
    return Table(model, columns, tuple(rows), _differences(rows, columns), has_paper=False)


def _shots(figure: RunFigure) -> str:
    k_shot = figure.settings.get("data.k_shot")
    return f"k = {k_shot}" if k_shot else ""


def _differences(rows: Sequence[Row], columns: Sequence[str]) -> tuple[str, ...]:
    """Each method against the reference (or the first that was run), where both have scores of the same examples."""
    found = []
    for index, column in enumerate(columns):
        measured = [(row.label, ours) for row in rows if (ours := row.cells[index].ours)]
        measured.sort(key=lambda pair: pair[1].first.method != REFERENCE)
        scores = [(label, _mean_scores(ours)) for label, ours in measured]
        for label, other in scores[1:]:
            reference = scores[0][1]
            if reference and other and reference.keys() == other.keys():
                difference = paired_difference(reference, other)
                words = difference_text(difference, (scores[0][0], label), measured[0][1].first.metric)
                found.append(f"{column}: {words}")
    return tuple(found)


def _mean_scores(measurement: Measurement) -> dict[str, float] | None:
    """Score of each example, averaged over seeds; None if a run's are not there or of other examples."""
    metric, evaluations = measurement.first.metric, [figure.evaluation for figure in measurement.figures]
    if metric not in (PASS_AT_1, *EXAMPLE_METRICS) or not all(one.has_answers for one in evaluations):
        return None
    of_runs = [one.grade(metric) for one in evaluations]
    if any(answers.keys() != of_runs[0].keys() for answers in of_runs):
        return None
    return {task_id: mean(answers[task_id].score for answers in of_runs) for task_id in of_runs[0]}

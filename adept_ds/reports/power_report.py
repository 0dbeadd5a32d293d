"""How many runs and problems would decide between methods, told from the verdicts of those that there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from adept_ds.errors import UserError
from adept_ds.evaluation.comparison import COUNTED_METRICS
from adept_ds.evaluation.power import Contrast, contrast, power
from adept_ds.reports.runs import RunFigure, read_runs, run_figures
from adept_ds.reports.tables import Measurement, choose, measurements
from adept_ds.reports.tables_report import grid

SEEDS = (2, 3, 5, 10, 20, 50)
"""Numbers of runs that are tried."""
MULTIPLES = (1, 2, 5, 10)
"""Numbers of problems that are tried, in those that there are."""
EXPERIMENTS = 1_000


@dataclass(frozen=True)
class Foreseen:
    """Two methods on one task, and how often experiments of other sizes would tell them apart."""

    names: tuple[str, str]
    runs: tuple[int, int]
    difference: float
    """Mean score of the second less that of the first."""
    powers: dict[tuple[int, int], float]
    """(Problems, runs of each) to the share of experiments."""


def power_text(folders: Sequence[Path], goal: float, seeds: Sequence[int], problems: Sequence[int]) -> str:
    """Tables of what experiments of several sizes would decide, for each pair of methods on each task.

    Args:
        folders: Run folders with evaluations, two of each method at least, or folders of such.
        goal: Share of experiments that are to be decided.
        seeds: Numbers of runs to try; `SEEDS` if there are none.
        problems: Numbers of problems to try; `MULTIPLES` of those that there are if there are none.

    Raises:
        UserError: No two methods have two runs each on the same problems.
    """
    figures, notes = run_figures(read_runs(folders))
    places: dict[tuple[str, ...], dict[str, list[RunFigure]]] = {}
    for figure in figures:
        if figure.method != "untuned" and figure.metric in COUNTED_METRICS and figure.evaluation.has_answers:
            place = figure.metric, figure.model, figure.task, figure.variant, str(figure.settings.get("data.k_shot"))
            places.setdefault(place, {}).setdefault(figure.label, []).append(figure)
    parts = []
    for (metric, model, task, *_), of_method in places.items():
        whole: dict[str, Measurement] = {}
        for name, some in of_method.items():
            if (one := choose([of_one for of_one in measurements(some) if of_one.runs > 1])) is not None:
                whole[name] = one
            else:
                notes.append(f"{name} on {task} has one run, which says nothing of how much runs differ: left out")
        scores = {name: _scores(one) for name, one in whole.items()}
        for first, second in combinations(whole, 2):
            count = len(scores[first][0])
            try:
                of = contrast(scores[first], scores[second])
            except UserError as error:
                notes.append(f"{first} and {second} on {task}: {error}: left out")
                continue
            sizes = [(n, s) for n in problems or [k * count for k in MULTIPLES] for s in seeds or SEEDS]
            powers = {size: power(of, size[1], size[0], EXPERIMENTS) for size in sizes}
            found = Foreseen((first, second), (whole[first].runs, whole[second].runs), of.difference, powers)
            parts.append(f"{metric} of {model} on {task}, {count:,} problems\n" + _text(found, of, goal))
    if not parts:
        raise UserError(
            "no two methods have two runs each with answers that are right or wrong "
            f"({', '.join(COUNTED_METRICS)}) on one task; give more run folders\n" + "\n".join(notes)
        )
    return "\n\n".join([ABOUT, *parts, *notes])


ABOUT = (
    "How often another experiment, with new runs on new problems of the same kind, would find a difference beyond "
    "noise, if the true one is as large as that found.\nThat is uncertain itself: one of half the size needs about "
    "four times as much."
)


def _scores(measurement: Measurement) -> list[dict[str, float]]:
    metric = measurement.first.metric
    return [
        {task_id: answer.score for task_id, answer in figure.evaluation.grade(metric).items()}
        for figure in measurement.figures
    ]


def _text(found: Foreseen, of: Contrast, goal: float) -> str:
    sizes = list(found.powers)
    seeds, problems = list(dict.fromkeys(s for _, s in sizes)), list(dict.fromkeys(n for n, _ in sizes))
    first, second = (f"{name} ({runs} runs)" for name, runs in zip(found.names, found.runs, strict=True))
    lines = [f"{second} against {first}: {100 * found.difference:+.2f} points"]
    if not found.difference:
        return f"{lines[0]}\nNo difference was found, so there is none to be foreseen."
    table = [(f"{n:,} problems", *(f"{100 * found.powers[n, s]:.0f} %" for s in seeds)) for n in problems]
    lines.append(grid(("", *(f"{s} runs of each" for s in seeds)), *table))
    enough = [
        f"{next(s for s in seeds if found.powers[n, s] >= goal)} runs of each on {n:,} problems"
        for n in problems
        if any(found.powers[n, s] >= goal for s in seeds)
    ]
    share = f"{100 * goal:.0f} % of experiments"
    lines.append(
        f"Of the sizes tried these decide {share}: {'; '.join(enough)}." if enough else f"None decides {share}."
    )
    return "\n".join(lines)

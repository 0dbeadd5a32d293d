"""One evaluation against another of the same problems: how far apart they are, whether that is more than chance, and
what each of them wrote.

Whatever sets two evaluations side by side does it by `compare`, and whatever puts a difference into words by
`difference_text`: the command, the page of one run, the tables of many.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from adept_ds.config.loader import flatten
from adept_ds.errors import UserError
from adept_ds.evaluation.results import Evaluation, GradedAnswer, sorted_verdicts
from adept_ds.evaluation.statistics import (
    FEWEST_CHANGED,
    SIGNIFICANCE,
    Estimate,
    PairedDifference,
    mean_score,
    paired_difference,
)

COUNTED_METRICS = {"pass@1": "solves", "accuracy": "answers", "exact_match": "answers"}
"""Metrics in which a problem with one sample is either right or wrong, and what a right one is called."""
FAVOURS_NEITHER = ("path", "generation.batch_size", "generation.seed")
"""Settings that two evaluations may differ in without a word about it."""
SHOWN_PROBLEMS = 2
SHOWN_LINES = 12
SHOWN_CHARACTERS = 160
"""How much of what was written the terminal gets: problems, lines of an answer, characters of a question."""


class NotComparableError(UserError):
    """Two evaluations are whole, but not of the same problems, or of a metric that cannot be compared."""


@dataclass(frozen=True)
class ShownProblem:
    """A problem with what was written for it."""

    task_id: str
    question: str
    answers: dict[str, GradedAnswer]
    """By the evaluation's name."""


@dataclass(frozen=True)
class Comparison:
    """The second evaluation against the first one, on the same problems or examples."""

    names: tuple[str, str]
    task: str
    """The text-to-text task; empty where programs were run."""
    metric: str
    first: Estimate
    second: Estimate
    difference: PairedDifference
    text: str
    """The difference in words, and what else is not the same in the two."""
    verdicts: dict[str, tuple[int, int]]
    """Verdict to the number of samples in the first and in the second."""
    problems: list[ShownProblem]
    """All of them, in the order of `problems_to_show`."""


def compare(first: Evaluation, second: Evaluation, k: int = 1, any_prompt: bool = False) -> Comparison:
    """Compare two evaluations on the problems that both are of.

    Args:
        first: For example the backbone's.
        second: For example the adapter's. The difference is this one's score minus the first one's.
        k: The k of pass@k. Tasks are compared by the first of their metrics that is a mean over examples.
        any_prompt: Compare answers to different prompts as well, if the problems have the same ids.

    Raises:
        NotComparableError: They are not of the same problems, or of a task without such a metric.
        UserError: Answers are missing or damaged, or a problem has fewer than `k` samples.
    """
    if first.name == second.name:
        first, second = (one.model_copy(update={"name": name}) for one, name in ((first, "first"), (second, "second")))
    paths = first.answers_path, second.answers_path
    if first.task_label != second.task_label:
        tasks = " and ".join(f"{one.answers_path} is of {one.task_label or 'programs'}" for one in (first, second))
        raise NotComparableError(f"{tasks}; expected two evaluations of the same task")
    hashes = [one.problems_sha256 or "" for one in (first, second)]
    if all(hashes) and hashes[0] != hashes[1] and not any_prompt:
        raise NotComparableError(
            f"{paths[0]} and {paths[1]} were scored on different problems, or on different prompts or tests "
            f"(problems_sha256 {hashes[0][:12]}... and {hashes[1][:12]}...); score both on the same file"
        )
    metric = first.example_metric(k)
    if metric is None:
        raise NotComparableError(
            f"{first.task_label} has no metric that is a mean over examples: {', '.join(first.figures)}"
        )
    graded = [first.grade(metric), second.grade(metric)]
    for one, other in ((0, 1), (1, 0)):
        only = sorted(graded[one].keys() - graded[other].keys())
        if only:
            raise NotComparableError(
                f"{len(only)} of the {len(graded[one])} problems of {paths[one]} are not in {paths[other]}, the first "
                f"is {only[0]!r}; a paired comparison needs the same problems in both"
            )
    scores = [{task_id: answer.score for task_id, answer in answers.items()} for answers in graded]
    counts = [Counter(chain.from_iterable(answer.verdicts for answer in answers.values())) for answers in graded]
    difference = paired_difference(*scores)
    text = difference_text(difference, (first.label, second.label), metric) + _unlike_text(first, second)
    return Comparison(
        names=(first.name, second.name),
        task=first.task_label,
        metric=metric,
        first=_estimate(first, metric, scores[0]),
        second=_estimate(second, metric, scores[1]),
        difference=difference,
        text=f"{first.task_label}: {text}" if first.task_label else text,
        verdicts={verdict: (counts[0][verdict], counts[1][verdict]) for verdict in sorted_verdicts(*counts)},
        problems=problems_to_show({first.name: graded[0], second.name: graded[1]}),
    )


def compare_with_baselines(evaluations: Sequence[Evaluation]) -> tuple[list[Comparison], list[str]]:
    """Compare every evaluation of an adapter with each evaluation without one that is of the same problems.

    Returns:
        The comparisons, and a sentence for each evaluation that could not be compared.

    Raises:
        UserError: Answers are damaged.
    """
    comparisons: list[Comparison] = []
    notes: list[str] = []
    for tuned in (one for one in evaluations if not one.is_baseline):
        name = f"{tuned.name} ({tuned.task_label})" if tuned.task_label else tuned.name
        baselines = [one for one in evaluations if one.is_baseline and one.task_label == tuned.task_label]
        if not baselines:
            notes.append(f"{name} is compared with nothing: there is no evaluation without an adapter.")
        found, refusals = [], []
        for baseline in baselines:
            if not (baseline.has_answers and tuned.has_answers):
                continue
            try:
                found.append(compare(baseline, tuned, any_prompt=True))
            except NotComparableError as error:
                refusals.append(f"{name} is not compared with {baseline.name}: {error}.")
        comparisons += found
        notes += [] if found else refusals
    return comparisons, notes


def problems_to_show(graded: Mapping[str, Mapping[str, GradedAnswer]]) -> list[ShownProblem]:
    """Return the problems of one evaluation, or those of two evaluations of the same problems, in the order to show.

    First those that the second one scores higher or lower on, so that any number of them holds both kinds in about the
    shares that they have; then those with the same score and another verdict; then the rest. All in the file's order.

    Args:
        graded: By the evaluation's name, its answers by problem.
    """
    first, second = next(iter(graded.values())), [*graded.values()][-1]
    changes = {task_id: second[task_id].score - answer.score for task_id, answer in first.items()}
    sides = [[task_id for task_id, change in changes.items() if sign * change > 0] for sign in (1, -1)]
    differing = sorted(
        (place / len(side), number, task_id) for number, side in enumerate(sides) for place, task_id in enumerate(side)
    )
    equal = [task_id for task_id, change in changes.items() if change == 0]
    equal.sort(key=lambda task_id: second[task_id].verdicts[:1] == first[task_id].verdicts[:1])
    return [
        ShownProblem(
            task_id,
            first[task_id].question or second[task_id].question,
            {name: answers[task_id] for name, answers in graded.items()},
        )
        for task_id in [*(task_id for *_, task_id in differing), *equal]
    ]


def difference_text(difference: PairedDifference, names: tuple[str, str], metric: str) -> str:
    """Say how far the second is from the first, and whether that is beyond the noise (`is_beyond_noise`).

    Args:
        difference: The second's scores minus the first's.
        names: What to call the first and the second.
        metric: The metric that the scores are of.
    """
    first, second = names
    n, mean, net = difference.n, round(difference.mean, 9), difference.better - difference.worse
    unit = "problems" if metric.startswith("pass@") else "examples"
    if metric in COUNTED_METRICS and math.isclose(n * difference.mean, net, abs_tol=1e-6):
        what = f"{n} {unit}" + (" right" if unit == "examples" else "")
        amount = f"{abs(net)} {'more' if net > 0 else 'fewer'} of {what} than" if net else f"as many of {what} as"
        claim = f"{second} {COUNTED_METRICS[metric]} {amount} {first}"
    else:
        relation = "a higher" if mean > 0 else "a lower" if mean < 0 else "the same"
        claim = f"{second} has {relation} {metric} {'than' if mean else 'as'} {first} on {n} {unit}"
    decimals = 1 if n < 1000 else 2
    points, low, high = (f"{100 * share:+.{decimals}f}" for share in (mean, difference.low, difference.high))
    p_value = f"= {difference.p_value:.2g}" if difference.p_value >= 1e-4 else "< 0.0001"
    text = (
        f"{claim} ({points} points, 95 % interval {low} to {high}; better on {difference.better}, worse on "
        f"{difference.worse}, sign test p {p_value}). {_judgement(difference, unit)}"
    )
    return text[0].upper() + text[1:] if text.startswith("the ") else text


def _judgement(difference: PairedDifference, unit: str) -> str:
    changed = difference.better + difference.worse
    if difference.is_beyond_noise:
        return f"That is beyond the noise of these {unit}."
    if round(difference.mean, 9) == 0:
        return "No difference shows."
    if changed < FEWEST_CHANGED:
        return (
            f"That could be chance: only {changed} of the {unit} came out differently, and it takes at least "
            f"{FEWEST_CHANGED} to tell."
        )
    doubts = ["the interval includes 0"] if difference.low <= 0 <= difference.high else []
    doubts += [f"the sign test's p is not below {SIGNIFICANCE}"] if difference.p_value >= SIGNIFICANCE else []
    return f"That could be chance: {' and '.join(doubts) or f'more {unit} changed the other way'}."


def _unlike_text(first: Evaluation, second: Evaluation) -> str:
    """Settings that are not the same in the two; empty if all are."""
    one, other = flatten(first.protocol), flatten(second.protocol)
    unlike = [key for key in one.keys() & other.keys() if one[key] != other[key] and key not in FAVOURS_NEITHER]
    settings = ", ".join(f"{key} ({one[key]} and {other[key]})" for key in sorted(unlike))
    return f" The two differ in settings, too: {settings}." if unlike else ""


def _estimate(evaluation: Evaluation, metric: str, scores: Mapping[str, float]) -> Estimate:
    if metric.startswith("pass@"):
        return mean_score(list(scores.values()))
    figure = evaluation.figures[metric]
    return Estimate(figure.value, figure.low, figure.high, len(scores), "bootstrap")


def comparison_text(comparison: Comparison) -> str:
    """Return the comparison as plain text: a table, the difference in words, verdicts, and a few problems."""
    names, difference = comparison.names, comparison.difference
    width = max(len(label) for label in (*names, *comparison.verdicts, "difference")) + 2
    column = max(8, len(comparison.metric))
    lines = [f"{'':{width}}{comparison.metric:>{column}}   {'95 % interval':^15}   by"]
    for name, row, unit, sign in (
        (names[0], comparison.first, " %", ""),
        (names[1], comparison.second, " %", ""),
        ("difference", difference, "", "+"),
    ):
        interval = f"{100 * row.low:{sign}5.1f} to {100 * row.high:{sign}5.1f}"
        mean = f"{100 * row.mean:{sign}.1f}{unit}"
        lines.append(f"{name:{width}}{mean:>{column}}   {interval:^15}   {row.method}")
    lines += [comparison.text, "", f"{'samples':{width}}{names[0]:>12}{names[1]:>12}"]
    lines += [f"{verdict:{width}}{one:>12}{other:>12}" for verdict, (one, other) in comparison.verdicts.items()]
    return "\n".join([*lines, *problems_text(comparison)])


def problems_text(comparison: Comparison) -> list[str]:
    """Return lines for the terminal with what both wrote for the first problems, long texts cut."""
    lines = []
    for problem in comparison.problems[:SHOWN_PROBLEMS]:
        lines += ["", f"{problem.task_id}: {_shortened(problem.question)}".removesuffix(": ")]
        for name, answer in problem.answers.items():
            reason = f" ({_shortened(answer.reason)})" if answer.reason else ""
            lines.append(f"  {name}: {answer.judgement}{reason}")
            written = "\n".join(line.rstrip() for line in answer.text.splitlines()).strip("\n").splitlines()
            lines += [f"    | {line}" for line in written[:SHOWN_LINES]]
            if len(written) > SHOWN_LINES:
                lines.append(f"    ... {len(written) - SHOWN_LINES} more lines")
    return lines


def _shortened(text: str) -> str:
    return textwrap.shorten(text, SHOWN_CHARACTERS, placeholder=" ...")


def comparison_json(comparison: Comparison, files: Sequence[Path]) -> str:
    """Return the comparison as a JSON object, without what was written."""
    facts = {"files": [str(path) for path in files], **asdict(comparison)}
    del facts["problems"]
    if not comparison.task:
        facts["k"] = int(comparison.metric.removeprefix("pass@"))
    return json.dumps({**facts, "beyond_noise": comparison.difference.is_beyond_noise}, indent=2) + "\n"

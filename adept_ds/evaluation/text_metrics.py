"""Scores of generated answers: label metrics, correlations, SQuAD's exact match and F1, with bootstrap intervals.

All metrics are fractions (correlations from -1 to 1), higher is better. The unit of every interval is the example.

- A prediction that is not a label word counts as wrong; with two label words it counts as the other one than the
  reference's, so that F1 and Matthews' coefficient see a mistake and no third class.
- A prediction that is not a finite number is -1 in a correlation, below every similarity, as in T5's evaluation.
- A coefficient that is undefined because all predictions (or all references) are equal is 0.
- An answer is compared with every reference, and the best one counts.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from adept_ds.data.tasks.task import MetricName, Task
from adept_ds.errors import UserError
from adept_ds.evaluation.statistics import bootstrap_interval

INVALID = -1
"""Code of a prediction that is no label word, and value of one that is no number."""


@dataclass(frozen=True)
class Interval:
    """A metric over `n` examples with its 95 % bootstrap interval [`low`, `high`]."""

    value: float
    low: float
    high: float
    n: int


def evaluate(
    task: Task, predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[MetricName] = ()
) -> dict[str, float]:
    """Return the task's metrics (or those of them that are given).

    Args:
        task: Says how an answer is taken from a generated text, and what its label words are.
        predictions: Generated texts, one an example.
        references: The right answers of each example, at least one; see `cut_references` for `faithful` tasks.
        metrics: Which metrics; all of the task's if empty.

    Raises:
        UserError: There is no example, or not one prediction for each.
    """
    samples = _statistics(task, predictions, references, metrics or task.metrics)
    everything = np.arange(len(predictions))
    return {name: statistic(everything) for name, statistic in samples.items()}


def evaluate_with_intervals(
    task: Task, predictions: Sequence[str], references: Sequence[Sequence[str]], resamples: int = 1_000, seed: int = 0
) -> dict[str, Interval]:
    """Return the task's metrics, each with its percentile bootstrap interval over examples.

    The same arguments give the same intervals. Where no resample can differ (all answers right, say), the interval has
    no width: few examples then tell less than it seems.

    Raises:
        UserError: As `evaluate`.
    """
    samples = _statistics(task, predictions, references, task.metrics)
    n = len(predictions)
    intervals = {}
    for name, statistic in samples.items():
        value = statistic(np.arange(n))
        bounds = (value, value) if n == 1 else bootstrap_interval(statistic, n, "percentile", resamples, seed)
        intervals[name] = Interval(value, *bounds, n)
    return intervals


def count_invalid(task: Task, predictions: Sequence[str]) -> int:
    """Return how many predictions are no label word, or no number where one is asked for."""
    answers = [task.answer(prediction) for prediction in predictions]
    if task.label_words:
        return sum(answer not in task.label_words for answer in answers)
    if any(metric in ("pearson", "spearman") for metric in task.metrics):
        return sum(_number(answer) is None for answer in answers)
    return 0


def exact_match(answer: str, reference: str) -> float:
    """SQuAD's exact match: 1 if the two are equal once normalised, else 0."""
    return float(normalize_answer(answer) == normalize_answer(reference))


def token_f1(answer: str, reference: str) -> float:
    """SQuAD's F1 over the tokens of the normalised texts; 0 where they have none in common, even if neither has any."""
    tokens, expected = normalize_answer(answer).split(), normalize_answer(reference).split()
    if not tokens or not expected:
        return 0.0
    common = (Counter(tokens) & Counter(expected)).total()
    # 2 PR / (P + R) with P = common / len(tokens) and R = common / len(expected).
    return 2 * common / (len(tokens) + len(expected))


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower-case, no punctuation, no articles, single spaces."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _statistics(
    task: Task, predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[MetricName]
) -> dict[str, Callable[[np.ndarray], float]]:
    """By metric: a function from indices of examples to its value on them."""
    if len(predictions) != len(references) or not predictions:
        raise UserError(
            f"task {task.name}: {len(predictions)} predictions for {len(references)} examples; expected one for each, "
            "and one at least"
        )
    answers = [task.answer(prediction) for prediction in predictions]
    if task.label_words:
        gold, predicted = _label_codes(task, answers, references)
        return {name: _of_labels(LABEL_FUNCTIONS[name], gold, predicted) for name in metrics}
    return {
        name: _correlation(task, name, answers, references)
        if name in CORRELATIONS
        else _mean_of_best(ANSWER_FUNCTIONS[name], answers, references)
        for name in metrics
    }


def _of_labels(metric: Callable[..., float], gold: np.ndarray, predicted: np.ndarray) -> Callable[[np.ndarray], float]:
    """The metric of chosen examples, from how often each pair of labels is among them.

    The same value as of the examples one by one, in a time that does not grow with them: a bootstrap asks a thousand
    times.
    """
    pairs, pair_of_example = np.unique(np.stack([gold, predicted]), axis=1, return_inverse=True)

    def statistic(chosen: np.ndarray) -> float:
        counts = np.bincount(pair_of_example[chosen], minlength=pairs.shape[1])
        present = counts > 0
        return float(metric(*pairs[:, present], sample_weight=counts[present]))

    return statistic


def _mean_of_best(
    compare: Callable[[str, str], float], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> Callable[[np.ndarray], float]:
    best = np.array(
        [max(compare(answer, one) for one in right) for answer, right in zip(answers, references, strict=True)]
    )
    return lambda chosen: float(best[chosen].mean())


def _label_codes(
    task: Task, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[np.ndarray, np.ndarray]:
    codes = {word: code for code, word in enumerate(task.label_words)}
    for right in references:
        if right[0] not in codes:
            raise UserError(f"task {task.name}: reference {right[0]!r} is none of {', '.join(codes)}")
    gold = np.array([codes[right[0]] for right in references])
    predicted = np.array([codes.get(answer, INVALID) for answer in answers])
    if len(codes) == 2:
        predicted = np.where(predicted == INVALID, 1 - gold, predicted)
    return gold, predicted


def _macro_f1(gold: np.ndarray, predicted: np.ndarray, sample_weight: np.ndarray) -> float:
    """Mean F1 of the labels that occur among references or predictions."""
    present = np.setdiff1d(np.union1d(gold, predicted), [INVALID])
    return f1_score(gold, predicted, labels=present, average="macro", sample_weight=sample_weight, zero_division=0.0)


def _binary_f1(gold: np.ndarray, predicted: np.ndarray, sample_weight: np.ndarray) -> float:
    """F1 of the second label word."""
    return f1_score(gold, predicted, pos_label=1, sample_weight=sample_weight, zero_division=0.0)


def _correlation(
    task: Task, name: str, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> Callable[[np.ndarray], float]:
    predicted = np.array([INVALID if (number := _number(answer)) is None else number for answer in answers])
    gold = np.array([_reference_number(task, right[0]) for right in references])

    def coefficient(chosen: np.ndarray) -> float:
        x, y = gold[chosen], predicted[chosen]
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            return 0.0
        return float(CORRELATIONS[name](x, y).statistic)

    return coefficient


def _reference_number(task: Task, reference: str) -> float:
    number = _number(reference)
    if number is None:
        raise UserError(f"task {task.name}: reference {reference!r} is no number, which {task.metrics[0]} needs")
    return number


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


LABEL_FUNCTIONS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy_score,
    "f1": _binary_f1,
    "macro_f1": _macro_f1,
    "matthews": matthews_corrcoef,
}
CORRELATIONS: dict[str, Callable[..., Any]] = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}
ANSWER_FUNCTIONS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "token_f1": token_f1}

"""Scores against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from adept_ds.data.tasks import TASKS, Task
from adept_ds.errors import UserError
from adept_ds.evaluation.statistics import bootstrap_interval
from adept_ds.evaluation.text_metrics import (
    count_invalid,
    evaluate,
    evaluate_with_intervals,
    exact_match,
    normalize_answer,
    token_f1,
)


def score(name: str, predictions: list[str], references: list[str]) -> dict[str, float]:
    return evaluate(TASKS[name], predictions, [(reference,) for reference in references])


def test_accuracy_and_binary_f1():
    # One true positive, one false positive, one false negative, one true negative.
    assert score("mrpc", ["1", "1", "0", "0"], ["1", "0", "1", "0"]) == {"accuracy": 0.5, "f1": 0.5}


def test_an_invalid_prediction_counts_as_the_other_label():
    # As 0, 1: no true positive, a false negative and a false positive.
    assert score("mrpc", ["yes", ""], ["1", "0"]) == {"accuracy": 0.0, "f1": 0.0}
    # As 1 1 0: two true positives, a false positive, none missed.
    assert score("mrpc", ["1", "1", "maybe"], ["1", "1", "0"])["f1"] == pytest.approx(0.8)


def test_f1_without_any_positive_is_zero():
    assert score("multirc", ["0", "0"], ["0", "0"]) == {"f1": 0.0}


def test_macro_f1_is_the_mean_over_the_labels():
    # F1 of 0: 2/3 (one hit, one missed); of 1: 2/3 (one hit, one too many); of 2: 1.
    result = score("cb", ["0", "1", "1", "2"], ["0", "0", "1", "2"])
    assert result == {"accuracy": 0.75, "macro_f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3)}


def test_macro_f1_gives_an_invalid_prediction_no_label_of_its_own():
    # F1 of 0: 2/3 (one hit, one missed), of 1: 1; an average over three would be lower.
    assert score("cb", ["0", "x", "1"], ["0", "0", "1"])["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_matthews_correlation():
    # TP 2, TN 1, FP 1, FN 0: (2 * 1 - 0) / sqrt(3 * 2 * 2 * 1)
    assert score("cola", ["1", "1", "1", "0"], ["1", "1", "0", "0"])["matthews"] == pytest.approx(2 / np.sqrt(12))


@pytest.mark.parametrize("predictions", [["1", "1", "1"], ["0", "0", "0"]])
def test_matthews_of_constant_predictions_is_zero(predictions):
    assert score("cola", predictions, ["1", "0", "1"]) == {"matthews": 0.0}


def test_correlations():
    result = score("stsb", ["1.0", "2.0", "4.0"], ["1.0", "2.0", "3.0"])
    # Deviations -4/3, -1/3, 5/3 and -1, 0, 1.
    assert result["pearson"] == pytest.approx(3 / np.sqrt(2 * 42 / 9))
    assert result["spearman"] == pytest.approx(1.0)


def test_ties_share_their_mean_rank():
    # Ranks 1.5, 1.5, 3 against 1, 2, 3: covariance 1.5, variances 1.5 and 2.
    assert score("stsb", ["1.0", "1.0", "2.0"], ["1.0", "2.0", "3.0"])["spearman"] == pytest.approx(1.5 / np.sqrt(3))


def test_correlation_of_constant_predictions_is_zero():
    assert score("stsb", ["3.0"] * 3, ["1.0", "2.0", "3.0"]) == {"pearson": 0.0, "spearman": 0.0}
    assert score("stsb", ["3.0"], ["1.0"]) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("invalid", ["", "high", "nan", "inf", "1,0"])
def test_what_is_no_number_is_below_every_similarity(invalid):
    references = ["0.0", "1.0", "2.0"]
    assert score("stsb", [invalid, "1.0", "2.0"], references) == score("stsb", ["-1", "1.0", "2.0"], references)


def test_a_reference_that_fits_no_label_or_number_is_an_error():
    with pytest.raises(UserError, match="reference '2' is none of 0, 1"):
        score("rte", ["1"], ["2"])
    with pytest.raises(UserError, match="reference 'x' is no number, which pearson needs"):
        score("stsb", ["1"], ["x"])


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Beatles!", "beatles"),
        ("an A-Team, the best", "ateam best"),
        ("Spider-Man's", "spidermans"),
        ("theatre", "theatre"),
        ("the", ""),
    ],
)
def test_squads_normalisation(text, normal):
    assert normalize_answer(text) == normal


def test_token_f1_is_the_harmonic_mean_of_precision_and_recall():
    # Common: big, cat. Precision 2/3, recall 2/4.
    assert token_f1("the big cat sat", "a big black cat ran") == pytest.approx(2 * 2 / (3 + 4))


def test_a_token_counts_as_often_as_it_is_in_both():
    assert token_f1("no no no", "no no yes") == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("answer", "reference", "is_equal"), [("", "", 1.0), ("", "x", 0.0), ("x", "the", 0.0), ("a", "the", 1.0)]
)
def test_texts_without_tokens_have_none_in_common(answer, reference, is_equal):
    assert token_f1(answer, reference) == 0  # as SQuAD's script for version 1.1
    assert exact_match(answer, reference) == is_equal


def test_the_best_reference_counts_for_each_metric():
    result = evaluate(TASKS["nq"], ["the red fox", "dog"], [("fox", "red foxes", "Red Fox"), ("cat", "a big dog")])
    assert result == {"token_f1": pytest.approx((1 + 2 / 3) / 2), "exact_match": 0.5}


def test_the_first_line_without_surrounding_space_is_the_answer():
    assert evaluate(TASKS["rte"], [" 1 \nsentence1: ..."], [("1",)]) == {"accuracy": 1.0}
    task = Task(name="t", dataset="d", source="{a}", target="b", postprocess="strip", metrics=("exact_match",))
    assert evaluate(task, ["x\ny"], [("x",)]) == {"exact_match": 0.0}


def test_invalid_predictions_are_counted():
    assert count_invalid(TASKS["rte"], ["1", " 0 ", "2", ""]) == 2
    assert count_invalid(TASKS["stsb"], ["3.4", "x", "nan"]) == 2
    assert count_invalid(TASKS["nq"], ["", "x"]) == 0


def test_one_prediction_is_needed_for_each_example():
    for predictions, references in ((["1"], []), ([], [])):
        with pytest.raises(UserError, match="expected one for each, and one at least"):
            evaluate(TASKS["rte"], predictions, references)


# Intervals


def test_interval_of_a_proportion_is_near_the_normal_one():
    low, high = bootstrap_interval(lambda chosen: float((chosen < 120).mean()), 400, "percentile", 2_000)
    margin = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert (low, high) == (pytest.approx(0.3 - margin, abs=0.006), pytest.approx(0.3 + margin, abs=0.006))


def test_intervals_depend_on_the_seed_alone():
    generator = np.random.default_rng(1)
    predictions, references = (generator.integers(0, 2, 60).astype(str).tolist() for _ in range(2))
    results = [
        evaluate_with_intervals(TASKS["cola"], predictions, [(r,) for r in references], 200, seed) for seed in (0, 0, 1)
    ]
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("name", ["mrpc", "cb", "cola", "stsb", "nq"])
def test_every_metric_lies_in_its_interval(name):
    generator = np.random.default_rng(0)
    references = generator.integers(0, 2, 50).astype(str)
    predictions = np.where(generator.random(50) < 0.8, references, "0")
    pairs = [(reference,) for reference in references.tolist()]
    result = evaluate_with_intervals(TASKS[name], predictions.tolist(), pairs, 200)
    assert list(result) == list(TASKS[name].metrics)
    for interval in result.values():
        assert interval.low < interval.value < interval.high
        assert interval.n == 50


def test_interval_of_one_example_is_its_value():
    (interval,) = evaluate_with_intervals(TASKS["rte"], ["1"], [("1",)]).values()
    assert (interval.low, interval.value, interval.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", ["mrpc", "cb", "cola"])
def test_label_metrics_are_those_of_scikit_learn_on_the_examples(name):
    generator = np.random.default_rng(3)
    labels = len(TASKS[name].label_words)
    gold, predicted = generator.integers(0, labels, (2, 200))
    expected = {
        "accuracy": accuracy_score(gold, predicted),
        "f1": f1_score(gold, predicted, average="binary") if labels == 2 else None,
        "macro_f1": f1_score(gold, predicted, average="macro"),
        "matthews": matthews_corrcoef(gold, predicted),
    }
    result = score(name, predicted.astype(str).tolist(), gold.astype(str).tolist())
    assert result == {metric: pytest.approx(expected[metric]) for metric in TASKS[name].metrics}

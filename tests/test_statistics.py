"""pass@k against its definition, and intervals against the coverage they promise."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from adept_ds.errors import UserError
from adept_ds.evaluation import statistics
from adept_ds.evaluation.statistics import mean_pass_at_k, paired_difference, pass_at_k, problem_scores


@pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 1), (1, 1, 1), (5, 2, 1), (6, 2, 3), (7, 6, 2), (7, 3, 7)])
def test_pass_at_k_is_the_share_of_sample_subsets_with_a_pass(n: int, c: int, k: int) -> None:
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_of_thousands_of_samples_does_not_overflow() -> None:
    assert pass_at_k(20_000, 1, 10_000) == 0.5


def test_fewer_samples_than_k_are_refused() -> None:
    with pytest.raises(UserError, match="at least 10 samples per problem, got 5"):
        pass_at_k(5, 0, 10)


def test_the_problem_with_too_few_samples_is_named() -> None:
    with pytest.raises(UserError, match=r"MBPP/7 has 4 \(and 1 more\)"):
        problem_scores({"MBPP/6": (5, 1), "MBPP/7": (4, 4), "MBPP/8": (0, 0)}, k=5)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_impossible_counts_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k needs k >= 1 and 0 <= c <= n"):
        pass_at_k(n, c, k)


def test_mean_weighs_problems_not_samples() -> None:
    estimate = mean_pass_at_k({"a": (10, 10), "b": (1, 0)}, k=1)
    assert (estimate.mean, estimate.n) == (0.5, 2)


def test_the_interval_is_the_bootstraps() -> None:
    # 10 of 40: the middle 95 % of resampled means, binomial ones here; BCa shifts them by little.
    estimate = mean_pass_at_k({str(i): (1, int(i < 10)) for i in range(40)}, k=1)
    assert estimate.method == "bootstrap"
    assert (estimate.low, estimate.high) == pytest.approx((0.125, 0.4), abs=0.03)


def test_the_same_results_give_the_same_interval_in_any_order() -> None:
    results = {str(i): (4, i % 5) for i in range(50)}
    backwards = dict(reversed(results.items()))
    assert mean_pass_at_k(results, 1) == mean_pass_at_k(backwards, 1) == mean_pass_at_k(results, 1)


@pytest.mark.parametrize(("passed", "low", "high"), [(0, 0.0, 0.0876), (5, 0.9124, 1.0)])
def test_scores_that_are_all_the_same_get_wilsons_interval(passed: int, low: float, high: float) -> None:
    estimate = mean_pass_at_k({str(i): (5, passed) for i in range(40)}, k=1)
    assert estimate.method == "wilson"
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-4)


def test_copies_of_one_sample_do_not_narrow_the_interval() -> None:
    once = {str(i): (1, int(i < 10)) for i in range(40)}
    ten_times = {task_id: (10 * n, 10 * c) for task_id, (n, c) in once.items()}
    assert mean_pass_at_k(ten_times, 1) == mean_pass_at_k(once, 1)


@pytest.mark.parametrize("samples", [1, 10])
def test_interval_covers_the_truth_as_often_as_it_says(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        chances = [rng.betavariate(0.5, 0.5) for _ in range(60)]
        passed = [sum(rng.random() < chance for _ in range(samples)) for chance in chances]
        estimate = mean_pass_at_k({str(i): (samples, c) for i, c in enumerate(passed)}, 1)
        covered += estimate.low <= 0.5 <= estimate.high
    # 95 % of 400 is 380; four standard errors either way.
    assert 363 <= covered <= 397


def test_mean_over_no_problems_is_refused() -> None:
    with pytest.raises(UserError, match="no problems"):
        mean_pass_at_k({}, 1)


def test_paired_difference_counts_the_problems_that_changed() -> None:
    first = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0}
    second = {"a": 0.0, "b": 1.0, "c": 1.0, "d": 0.0}
    difference = paired_difference(first, second)
    assert (difference.mean, difference.better, difference.worse, difference.n) == (0.25, 2, 1, 4)
    assert difference.low < 0 < difference.high


def test_p_value_is_mcnemars_exact_one() -> None:
    # 9 against 1 discordant pairs: 2 * (C(10, 0) + C(10, 1)) / 2^10.
    first = {str(i): float(i == 0) for i in range(30)}
    second = {str(i): float(1 <= i < 10) for i in range(30)}
    assert paired_difference(first, second).p_value == pytest.approx(22 / 1024)


@pytest.mark.parametrize(
    ("better", "worse", "beyond"),
    [
        (5, 0, False),  # p = 0.0625, though the interval excludes 0
        (6, 0, True),
        (0, 6, True),
        (12, 4, False),  # p = 0.077
        (15, 4, True),
        (20, 20, False),
        (0, 0, False),
    ],
)
def test_a_difference_is_beyond_the_noise_if_interval_and_sign_test_agree(
    better: int, worse: int, beyond: bool
) -> None:
    first = {str(i): float(i < worse) for i in range(60)}
    second = {str(i): float(worse <= i < worse + better) for i in range(60)}
    assert paired_difference(first, second).is_beyond_noise is beyond


def test_many_small_steps_do_not_outvote_a_few_large_ones() -> None:
    first = {str(i): 0.2 if i < 90 else 0.0 for i in range(100)}
    second = {str(i): 0.19 if i < 90 else 1.0 for i in range(100)}
    difference = paired_difference(first, second)
    assert difference.low > 0
    assert difference.p_value < 0.05
    assert not difference.is_beyond_noise


def test_a_difference_both_ways_has_the_bootstraps_interval() -> None:
    # 12 better, 4 worse of 100: standard error sqrt(0.16 - 0.08^2) / 10 = 0.039.
    first = {str(i): float(i < 4) for i in range(100)}
    second = {str(i): float(4 <= i < 16) for i in range(100)}
    difference = paired_difference(first, second)
    assert difference.method == "bootstrap"
    assert (difference.low, difference.high) == pytest.approx((0.08 - 0.077, 0.08 + 0.077), abs=0.02)


def test_few_problems_that_speak_one_way_leave_doubt() -> None:
    # Resampled means of such differences are never below zero, though the sign test says p = 0.25.
    first = {str(i): 0.0 for i in range(40)}
    second = {str(i): float(i < 3) for i in range(40)}
    difference = paired_difference(first, second)
    assert (difference.method, difference.p_value) == ("agresti-min", 0.25)
    assert difference.low < 0 < difference.mean < difference.high


def test_equal_runs_differ_by_nothing_with_some_doubt() -> None:
    scores = {str(i): float(i % 2) for i in range(40)}
    difference = paired_difference(scores, scores)
    assert (difference.mean, difference.p_value) == (0.0, 1.0)
    assert difference.low < 0 < difference.high


def test_runs_over_different_problems_are_not_compared() -> None:
    with pytest.raises(UserError, match="MBPP/2 is only in one of them"):
        paired_difference({"MBPP/1": 1.0}, {"MBPP/1": 1.0, "MBPP/2": 0.0})

"""pass@k, how certain it is, and whether two runs differ.

The unit of every interval is the problem: samples of one problem resemble each other, so an interval over all samples
would be far too narrow. The bootstrap's resamples are drawn from a fixed seed, so the same results always give the same
figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from scipy.stats import binomtest, bootstrap

from adept_ds.errors import UserError

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
FEWEST_CHANGED = 6
"""Problems that must come out differently before the sign test can fall below `SIGNIFICANCE`: 2 / 2^5 is above it."""
# Half-width of a 95 % interval in standard errors.
Z95 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
RESAMPLES = 10_000
BATCH_ELEMENTS = 10_000_000
"""Indices that the bootstrap holds at a time."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` problems with its 95 % confidence interval [`low`, `high`]."""

    mean: float
    low: float
    high: float
    n: int
    method: str
    """How the interval was made: "bootstrap", or "wilson" where all problems have the same score."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean of `second - first` over the `n` problems that both runs answered, with its 95 % interval.

    `better` and `worse` count the problems on which the second run scores higher or lower than the first; `p_value` is
    that of the exact two-sided sign test on the two counts (McNemar's exact test when each problem has one sample).
    """

    mean: float
    low: float
    high: float
    n: int
    better: int
    worse: int
    p_value: float
    method: str
    """How the interval was made: "bootstrap", or "agresti-min" where no two problems differ in opposite directions."""

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the difference is more than the choice of problems explains.

        Two things must hold, in the same direction: the interval excludes 0, and the sign test's p is below 0.05. Each
        alone is too easily met. A bootstrap of few problems is too narrow; and the sign test asks only on how many
        problems a score rose or fell, so that with several samples a problem many small steps one way outvote a few
        large ones the other way. Both take a problem's samples as one observation, however many they are. With fewer
        than six problems that came out differently the sign test cannot be met, all in one direction or not.
        """
        same_direction = (self.low > 0 and self.better > self.worse) or (self.high < 0 and self.worse > self.better)
        return same_direction and self.p_value < SIGNIFICANCE


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of `k` samples passes, when `c` of `n` drawn samples passed.

    pass@k = 1 - C(n - c, k) / C(n, k)   (Chen et al. 2021, eq. 1), in integers up to one division.

    Raises:
        UserError: `n` < `k`, where the estimate is undefined.
        ValueError: `k` < 1, or `c` outside [0, `n`].
    """
    if k < 1 or not 0 <= c <= n:
        raise ValueError(f"pass@k needs k >= 1 and 0 <= c <= n, got n={n}, c={c}, k={k}")
    if n < k:
        raise UserError(f"pass@{k} needs at least {k} samples per problem, got {n}")
    subsets = math.comb(n, k)
    return (subsets - math.comb(n - c, k)) / subsets


def problem_scores(results: Mapping[str, tuple[int, int]], k: int) -> dict[str, float]:
    """pass@k of each problem; `results` maps a task id to (samples n, passed samples c).

    Raises:
        UserError: a problem has fewer than `k` samples; names the problem.
    """
    short = [task_id for task_id, (n, _) in results.items() if n < k]
    if short:
        task_id = short[0]
        more = f" (and {len(short) - 1} more)" if len(short) > 1 else ""
        raise UserError(f"pass@{k} needs at least {k} samples per problem; {task_id} has {results[task_id][0]}{more}")
    return {task_id: pass_at_k(n, c, k) for task_id, (n, c) in results.items()}


def mean_pass_at_k(results: Mapping[str, tuple[int, int]], k: int) -> Estimate:
    """Average pass@k over problems; `results` maps a task id to (samples n, passed samples c). See `mean_score`.

    Raises:
        UserError: there is no problem, or one has fewer than `k` samples.
    """
    if not results:
        raise UserError(f"pass@{k} of no problems is undefined")
    return mean_score(list(problem_scores(results, k).values()))


def mean_score(scores: Sequence[float]) -> Estimate:
    """Average of the problems' scores, one in [0, 1] for each; there must be a problem.

    The interval is the bias-corrected and accelerated bootstrap's over problems (Efron 1987, `RESAMPLES` resamples).
    Problems that all have the same score resample to that score only; the interval is then Wilson's (1927) for as many
    trials as there are problems, so that a score of 0 or 1 has an honest interval too.
    """
    mean = math.fsum(scores) / len(scores)
    is_varied = len(set(scores)) > 1
    low, high = _bootstrap(scores) if is_varied else _wilson(mean, len(scores))
    return Estimate(mean, low, high, len(scores), "bootstrap" if is_varied else "wilson")


def paired_difference(first: Mapping[str, float], second: Mapping[str, float]) -> PairedDifference:
    """Compare two runs over the same problems; both map a task id to that problem's score in [0, 1].

    The interval is the bias-corrected and accelerated bootstrap's over problems. If one run is nowhere worse than the
    other, resampling can never show it worse, however few problems speak for it; the interval is then that of Agresti
    and Min (2005) for paired proportions: a normal interval for the mean difference after adding half a problem to each
    of the four outcomes (both pass, only the first, only the second, neither).

    Raises:
        UserError: the runs do not cover the same problems, or there are none.
    """
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise UserError(f"a paired comparison needs the same problems in both runs; {odd[0]} is only in one of them")
    if not first:
        raise UserError("a paired comparison of no problems is undefined")
    differences = [second[task_id] - first[task_id] for task_id in first]
    better = sum(difference > 0 for difference in differences)
    worse = sum(difference < 0 for difference in differences)
    changed = better + worse
    is_both_ways = better > 0 and worse > 0
    low, high = _bootstrap(differences) if is_both_ways else _agresti_min(differences)
    return PairedDifference(
        mean=math.fsum(differences) / len(differences),
        low=low,
        high=high,
        n=len(differences),
        better=better,
        worse=worse,
        p_value=float(binomtest(better, changed).pvalue) if changed else 1.0,
        method="bootstrap" if is_both_ways else "agresti-min",
    )


def bootstrap_interval(
    statistic: Callable[..., float | np.ndarray],
    n: int,
    method: Literal["BCa", "percentile"],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a statistic of `n` units, two at least.

    Args:
        statistic: Takes the indices of units, some perhaps several times. For BCa it must not be the same for all. If
            it has an argument `axis`, it gets many samples at once, each along that axis.
        n: Number of units.
        method: BCa corrects bias and skew, and asks for the statistic without each unit in turn as well.
        resamples: How many samples of n units are drawn with replacement.
        seed: Another seed draws others.
    """
    interval = bootstrap(
        (np.arange(n),),
        statistic,
        n_resamples=resamples,
        batch=max(1, BATCH_ELEMENTS // n),
        confidence_level=CONFIDENCE,
        method=method,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean over problems, whatever their order; the values must not be all the same."""
    ordered = np.sort(values)
    return bootstrap_interval(lambda chosen, axis: ordered[chosen].mean(axis=axis), len(ordered), "BCa")


def _agresti_min(differences: Sequence[float]) -> tuple[float, float]:
    m = len(differences)
    centre = math.fsum(differences) / (m + 2)
    variance = (math.fsum(difference**2 for difference in differences) + 1) / (m + 2) - centre**2
    margin = Z95 * math.sqrt(variance / (m + 2))
    return max(-1.0, centre - margin), min(1.0, centre + margin)


def _wilson(p: float, n: float) -> tuple[float, float]:
    z2 = Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    margin = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    # At p = 0 and p = 1 one bound is p itself; rounding may put it a hair on the other side.
    return max(0.0, min(p, centre - margin)), min(1.0, max(p, centre + margin))

"""How many runs and problems another comparison of two methods needs, foreseen from the verdicts that there are.

A method solves problem i with a chance p_i; a run of another seed is another draw. Of R runs on n problems the share
solved of each problem, y_i, varies more than p_i does. So the p_i of a method are taken to be a Beta distribution with
the mean of y, and the variance of y less that of the draws. Two methods' p_i are drawn together, with the covariance
of their y: hard problems are hard for both, and draws of different runs have no covariance. What a whole run is better
or worse than others of its method, beyond chance, is a factor of all its p_i.

The power is the share of simulated experiments (a parametric bootstrap), each with new problems and new runs, in which
a difference as large as the one found would be beyond noise: by the rule of `PairedDifference.is_beyond_noise`, with a
normal interval in the place of the bootstrap's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, ndtr
from scipy.stats import binom

from adept_ds.errors import UserError
from adept_ds.evaluation.statistics import SIGNIFICANCE, Z95

DRAWS = 10_000
"""Pairs of chances that problems are drawn from."""
EXPERIMENTS = 2_000
HALVINGS = 12
"""Steps of the search for the correlation that gives a covariance."""
FEWEST = 6
"""Problems that must come out differently, all to one side, for the sign test."""
ELEMENTS = 2_000_000
"""Problems of simulated experiments that are held at a time."""


@dataclass(frozen=True)
class Chances:
    """The distribution of a method's chances over problems, as its runs leave it."""

    mean: float
    alpha: float
    """First parameter of the Beta distribution."""
    beta: float
    """Second one."""
    solved: np.ndarray
    """Mean score of each problem over the runs [n]."""
    trials: int
    """Independent draws that a run's score of a problem is worth."""
    spread: float
    """Standard deviation of the factor of a whole run."""

    def at(self, normal: np.ndarray) -> np.ndarray:
        """The chances that stand where standard normal values do, among all."""
        chances: np.ndarray = betaincinv(self.alpha, self.beta, ndtr(normal))
        return chances


@dataclass(frozen=True)
class Contrast:
    """Two methods on the same problems, as further experiments are drawn from."""

    chances: tuple[Chances, Chances]
    pool: np.ndarray
    """Pairs of chances [2, DRAWS]."""

    @property
    def difference(self) -> float:
        """Mean score of the second less that of the first."""
        return self.chances[1].mean - self.chances[0].mean


def contrast(first: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]], seed: int = 0) -> Contrast:
    """Return what the runs of two methods say, each the score of each problem.

    Raises:
        UserError: A method has one run, runs are of different problems, or of fewer than `FEWEST`.
    """
    ids = sorted(first[0])
    if len(ids) < FEWEST:
        raise UserError(f"the runs are of {len(ids)} problems; expected {FEWEST} or more, fewer decide nothing")
    if any(sorted(run) != ids for run in (*first, *second)):
        raise UserError("the runs are not of the same problems; evaluate all on the same ones")
    one, other = (_chances(np.array([[run[task_id] for task_id in ids] for run in runs])) for runs in (first, second))
    covariance = float(np.cov(one.solved, other.solved)[0, 1])
    normal, free = np.random.default_rng(seed).standard_normal((2, DRAWS))
    chances = one.at(normal)

    def together(correlation: float) -> np.ndarray:
        return other.at(correlation * normal + math.sqrt(1 - correlation**2) * free)

    low, high = -1.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        is_less = float(np.cov(chances, together(middle))[0, 1]) < covariance
        low, high = (middle, high) if is_less else (low, middle)
    return Contrast((one, other), np.stack([chances, together(high)]))


def power(of: Contrast, seeds: int, problems: int, experiments: int = EXPERIMENTS, seed: int = 0) -> float:
    """Share of experiments with so many runs of each method on so many problems in which the difference is beyond
    noise, in the direction of the one that was found."""
    if problems < FEWEST:
        return 0.0
    generator = np.random.default_rng(seed)
    decided, left = 0, experiments
    while left:
        count = min(left, max(1, ELEMENTS // problems))
        left -= count
        chosen = generator.integers(DRAWS, size=(count, problems))
        scores = []
        for chances, pool in zip(of.chances, of.pool, strict=True):
            factor = 1 + chances.spread / math.sqrt(seeds) * generator.standard_normal((count, 1))
            trials = seeds * chances.trials
            scores.append(generator.binomial(trials, np.clip(pool[chosen] * factor, 0, 1)) / trials)
        difference = math.copysign(1, of.difference) * (scores[1] - scores[0])
        better, worse = (difference > 0).sum(1), (difference < 0).sum(1)
        mean, error = difference.mean(1), difference.std(1, ddof=1) / math.sqrt(problems)
        p_values = 2 * binom.cdf(np.minimum(better, worse), better + worse, 0.5)
        decided += int(((mean > Z95 * error) & (better > worse) & (p_values < SIGNIFICANCE)).sum())
    return decided / experiments


def _chances(scores: np.ndarray) -> Chances:
    """What the scores [R, n] of a method's runs say of its chances."""
    runs, problems = scores.shape
    if runs < 2:
        raise UserError(
            "a method with one run says nothing of how much runs differ; expected two or more with other seeds (train."
            "seed) of each method"
        )
    solved, mean = scores.mean(0), float(scores.mean())
    within = float(scores.var(0, ddof=1).mean())
    highest = mean * (1 - mean)
    between = min(max(float(solved.var(ddof=1)) - within / runs, 1e-6 * highest), highest * (1 - 1e-6))
    precision = highest / between - 1 if between else 1.0
    # Scores of several samples are less uncertain than one draw, if what a run can do is as good as all of it.
    trials = max(1, round((highest - between) / within)) if within else 1
    excess = float(scores.mean(1).var(ddof=1)) - within / problems
    return Chances(
        mean=mean,
        alpha=mean * precision + 1e-9,
        beta=(1 - mean) * precision + 1e-9,
        solved=solved,
        trials=trials,
        spread=math.sqrt(max(excess, 0.0)) / mean if mean else 0.0,
    )

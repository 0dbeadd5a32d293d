"""Schedules by name: their factors are transformers', step by step; what does not go is refused by name."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from adept_ds.config.schedule import OPTIONS, REFUSED, ScheduleName, check_options, rate_factor
from adept_ds.errors import UserError

NAMES = get_args(get_args(ScheduleName)[0])
TOTAL = 40
CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("constant_with_warmup", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {"lr_end": 1e-3, "power": 2}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 100}),
    ("cosine_with_min_lr", {"min_lr": 0.01}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 10}),
    ("warmup_stable_decay", {"num_decay_steps": 10, "warmup_type": "cosine", "decay_type": "1-sqrt"}),
]


def transformers_rates(name: str, options: dict[str, Any], peak: float, warmup: int, total: int) -> list[float]:
    """Rate of each step of an optimizer that transformers' own scheduler drives."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(name, optimizer, warmup, total, options)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("peak", [0.3, 0.05])
@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_each_step_has_the_rate_that_transformers_gives_it(name, options, warmup, peak):
    factor = rate_factor(name, options, peak, warmup, TOTAL)
    assert [factor(step) * peak for step in range(TOTAL)] == transformers_rates(name, options, peak, warmup, TOTAL)


def test_every_schedule_is_among_the_cases():
    assert {name for name, _ in CASES} == set(NAMES) - {"constant"}


@pytest.mark.parametrize("warmup", [0, 7, 39])
def test_constant_has_a_warm_up(warmup):
    factor = rate_factor("constant", {}, 0.3, warmup, TOTAL)
    assert [factor(step) for step in range(TOTAL)] == [
        min(1.0, step / warmup if warmup else 1.0) for step in range(TOTAL)
    ]


def test_the_names_are_those_of_transformers():
    assert {*NAMES, *REFUSED} == {schedule.value for schedule in SchedulerType}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"constant"}))
def test_the_options_are_those_of_transformers(name):
    arguments = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert set(OPTIONS.get(name, ())) == set(arguments) - given


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosine", {"num_cycle": 2}, "'num_cycle', which schedule 'cosine' has not: .*did you mean 'num_cycles'"),
        ("linear", {"power": 2}, "'power', which schedule 'linear' has not: it has none"),
        ("cosine", {"num_cycles": [2]}, r"num_cycles \[2\]; expected a number or a string"),
        ("cosine", {"num_cycles": True}, "num_cycles True; expected a number or a string"),
    ],
)
def test_options_are_checked_with_the_settings(name, options, message):
    with pytest.raises(ValueError, match=message):
        check_options(name, options)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "quadratic"}, "Unknown decay type: quadratic"),
        ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate"),
        ("cosine", {"num_cycles": "two"}, "could not convert string to float"),
        ("inverse_sqrt", {"timescale": 0}, "division by zero"),
        ("polynomial", {"lr_end": 0.5}, "must be smaller than initial lr"),
        ("cosine_with_min_lr", {"min_lr": 0.6}, "times the peak rate"),
    ],
)
def test_options_that_transformers_refuses_or_that_go_above_the_peak(name, options, reason):
    with pytest.raises(
        UserError, match=rf"train\.schedule_options .* do not go with train\.schedule '{name}'.*{reason}"
    ):
        rate_factor(name, options, 0.3, 4, TOTAL)

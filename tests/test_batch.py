"""Warm-up as a number of steps or a share of them."""

from __future__ import annotations

from typing import Any

import pytest

from adept_ds.config.batch import learning_rates, warmup_steps
from adept_ds.config.run import TrainConfig


def train(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"epochs": 1} | values)


def test_the_papers_warm_up_is_the_default():
    assert warmup_steps(train(), 1_220) == 500
    assert train(warmup_steps=None).warmup_steps == 500


@pytest.mark.parametrize(
    ("ratio", "total", "steps"),
    [(0.1, 1_220, 122), (0.1, 30, 3), (0.1, 2, 0), (0.29, 100, 29), (0.9, 1, 0), (0.0, 9, 0)],
)
def test_a_share_is_rounded_and_leaves_a_step(ratio, total, steps):
    assert warmup_steps(train(warmup_ratio=ratio), total) == steps


def test_a_resolved_config_with_a_share_loads_back():
    config = train(warmup_ratio=0.1)
    assert config.warmup_steps is None
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


def test_each_group_has_its_own_peak():
    peaks = {"soft_prompt": 0.3, "network": 1e-4}
    rates = learning_rates(train(warmup_steps=4, learning_rate=peaks), peaks, 10)
    assert rates(0) == {"soft_prompt": 0.0, "network": 0.0}
    assert rates(4) == peaks
    assert rates(7) == pytest.approx({"soft_prompt": 0.15, "network": 5e-5})


def test_a_floor_is_the_same_rate_for_groups_of_different_peaks():
    peaks = {"soft_prompt": 0.3, "network": 0.1}
    config = train(schedule="polynomial", schedule_options={"lr_end": 0.01}, warmup_steps=0, learning_rate=peaks)
    last = learning_rates(config, peaks, 10_000)(9_999)
    assert last == pytest.approx({"soft_prompt": 0.01, "network": 0.01}, rel=0.01)

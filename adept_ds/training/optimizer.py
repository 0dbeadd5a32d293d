"""AdamW with one parameter group for each peak learning rate, and the schedule that scales them all."""

from __future__ import annotations

import torch

from adept_ds.config.run import TrainConfig
from adept_ds.model.adapted_model import AdaptedModel


def build_optimizer(model: AdaptedModel, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters. Every group carries its `name` and its `peak_lr`."""
    parameters = model.trainable_parameters()
    groups = [
        {
            "name": group,
            "params": [parameters[name] for name in names],
            "peak_lr": getattr(config.learning_rate, group),
        }
        for group, names in model.learning_rate_groups().items()
    ]
    return torch.optim.AdamW(
        groups, lr=0.0, betas=config.adam_betas, eps=config.adam_eps, weight_decay=config.weight_decay
    )


def learning_rate_factor(step: int, config: TrainConfig, total_steps: int) -> float:
    """Share of the peak rate that the optimizer step with number `step` (the first is 0) is taken with.

    Warm-up: step / warmup_steps. Then, for the linear schedule, (total_steps - step) / (total_steps - warmup_steps).
    This is `transformers`' linear schedule; its first step is taken at a rate of zero if there is a warm-up.
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    return (total_steps - step) / (total_steps - config.warmup_steps)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group's rate to `factor` times its peak; return the rates by group name."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
        rates[group["name"]] = group["lr"]
    return rates

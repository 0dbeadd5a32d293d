"""AdamW with one parameter group for each peak learning rate."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adept_ds.config.run import TrainConfig
from adept_ds.model.adapted_model import AdaptedModel


def build_optimizer(model: AdaptedModel, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters. Every group carries its `name`, and its peak rate as yet."""
    parameters = model.trainable_parameters()
    groups = [
        {
            "name": group,
            "params": [parameters[name] for name in names],
            "lr": getattr(config.learning_rate, group),
        }
        for group, names in model.learning_rate_groups().items()
    ]
    return torch.optim.AdamW(groups, betas=config.adam_betas, eps=config.adam_eps, weight_decay=config.weight_decay)


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: Mapping[str, float]) -> None:
    """Set every group's rate, given by the group's name."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]

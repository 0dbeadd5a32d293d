"""The course of the learning rate over a run: the schedules that `transformers` has by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from adept_ds.errors import UserError, did_you_mean

OPTIONS: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}
"""The options of each schedule that has any. Names are written down in this file since `transformers` takes seconds to
load; a test compares them with its own."""

REFUSED = {
    "reduce_lr_on_plateau": "follows the validation figures",
    "greedy": "follows the loss of every step",
}
"""The schedules of `transformers` that have a state of their own, with what they look at."""


ROUNDING = 1e-9
"""By how much a factor may be above 1."""


def _refuse_stateful(name: Any) -> Any:
    if name in REFUSED:
        raise ValueError(
            f"schedule {name!r} {REFUSED[name]} and not the step alone, so a resumed run would not be the same run; "
            "expected another, such as 'cosine' (early_stopping_patience ends a run that no longer gets better)"
        )
    return name


ScheduleName = Annotated[
    Literal[
        "linear",
        "constant",
        "constant_with_warmup",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ],
    BeforeValidator(_refuse_stateful),
]


def check_options(schedule: str, options: Mapping[str, Any]) -> None:
    """Refuse options that the schedule does not have, and values that none has.

    Raises:
        ValueError: Names the option and the nearest one.
    """
    known = OPTIONS.get(schedule, ())
    for name, value in options.items():
        if name not in known:
            expected = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(
                f"schedule_options has {name!r}, which schedule {schedule!r} has not: {expected}"
                f"{did_you_mean(name, known)}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(f"schedule_options has {name} {value!r}; expected a number or a string")


def rate_factor(
    schedule: str, options: Mapping[str, Any], peak: float, warmup_steps: int, total_steps: int
) -> Callable[[int], float]:
    """Return the share of the peak rate that the optimizer step with a number (the first is 0) is taken with.

    It is `transformers`' own function; with a warm-up, that of most schedules is zero at the first step. `constant` is
    constant after the warm-up here, which `transformers` calls `constant_with_warmup`.

    Args:
        schedule: A `ScheduleName`.
        options: Its options; those that are rates (`lr_end`, `min_lr`) are no shares.
        peak: The peak rate.
        warmup_steps: Steps of warm-up.
        total_steps: Steps of the whole run.

    Raises:
        UserError: `transformers` refuses the options, or they make a rate above the peak or below zero.
    """
    # They load torch, which the settings alone do without.
    import torch
    from transformers import get_scheduler

    name = "constant_with_warmup" if schedule == "constant" else schedule
    try:
        optimizer = torch.optim.SGD([torch.zeros(())], lr=peak)
        (factor,) = get_scheduler(name, optimizer, warmup_steps, total_steps, dict(options)).lr_lambdas
        for step in range(total_steps):
            if not 0 <= factor(step) <= 1 + ROUNDING:
                raise ValueError(f"step {step + 1} would be taken with {factor(step):g} times the peak rate")
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(
            f"train.schedule_options {dict(options)} do not go with train.schedule {schedule!r}, {warmup_steps} steps "
            f"of warm-up out of {total_steps} and a peak rate of {peak:g}: {error}"
        ) from error
    return factor

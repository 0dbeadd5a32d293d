"""The arithmetic of a run: how a global batch is split, how many steps there are, and at which rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from adept_ds.config.run import TrainConfig
from adept_ds.config.schedule import rate_factor
from adept_ds.errors import UserError


@dataclass(frozen=True)
class BatchArithmetic:
    """global_batch_size = micro_batch_size * gradient_accumulation_steps * world_size, where rows are not packed."""

    global_batch_size: int
    """Examples of an optimizer step."""
    micro_batch_size: int
    """Rows of a forward pass: of one example each, or packed."""
    gradient_accumulation_steps: int
    """Forward passes of an optimizer step; with packing the most that one can have, if no two examples share a row."""
    world_size: int
    packing: int | None = None
    """Tokens of a packed row; None where a row has one example."""


def batch_arithmetic(train: TrainConfig, world_size: int) -> BatchArithmetic:
    """Split the global batch over ranks, forward passes and examples.

    A micro-batch size that is not given is the largest that the other values allow, and one row with packing, where any
    number of examples goes with any number of ranks.

    Raises:
        UserError: The batch does not divide, or the sizes contradict one another.
    """
    size, micro, accumulation = train.global_batch_size, train.micro_batch_size, train.gradient_accumulation_steps
    if train.packing is not None:
        rows = micro or 1
        return BatchArithmetic(size, rows, -(-size // (rows * world_size)), world_size, train.packing)
    given = (
        f"train.global_batch_size = {size}, train.micro_batch_size = {micro}, train.gradient_accumulation_steps = "
        f"{accumulation}, world size = {world_size}"
    )
    if micro is not None and accumulation is not None:
        if micro * accumulation * world_size != size:
            raise UserError(
                f"{given}: micro_batch_size x gradient_accumulation_steps x world size is "
                f"{micro * accumulation * world_size}; set global_batch_size to that, or leave out one of the two"
            )
        return BatchArithmetic(size, micro, accumulation, world_size)
    if size % world_size:
        raise UserError(
            f"{given}: the global batch must divide by the world size; expected global_batch_size "
            f"{_nearest_multiples(size, world_size)}, or a world size among {_divisors(size)}"
        )
    per_rank = size // world_size
    chosen = micro or accumulation or 1
    if per_rank % chosen:
        name = "micro_batch_size" if micro is not None else "gradient_accumulation_steps"
        raise UserError(
            f"{given}: {name} must divide the {per_rank} examples of one rank; expected one of {_divisors(per_rank)}, "
            f"or global_batch_size {_nearest_multiples(size, chosen * world_size)}"
        )
    if micro is not None:
        return BatchArithmetic(size, micro, per_rank // micro, world_size)
    return BatchArithmetic(size, per_rank // chosen, chosen, world_size)


def count_steps(config: TrainConfig, examples: int) -> int:
    """Optimizer steps of the whole run; the last step of an epoch may have fewer examples.

    Raises:
        UserError: The warm-up does not fit in.
    """
    total = config.max_steps or (config.epochs or 0) * math.ceil(examples / config.global_batch_size)
    if (config.warmup_steps or 0) >= total:
        raise UserError(
            f"train.warmup_steps is {config.warmup_steps}, but the run has {total} steps ({config.epochs} epochs of "
            f"{examples} examples, {config.global_batch_size} a step); expected: less. For a run as short as this one "
            f"{config.shorter_warmup}"
        )
    return total


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Steps of warm-up in a run of so many steps."""
    if config.warmup_ratio is None:
        return config.warmup_steps or 0
    return min(round(config.warmup_ratio * total_steps), total_steps - 1)


def learning_rates(config: TrainConfig, groups: Iterable[str], total_steps: int) -> Callable[[int], dict[str, float]]:
    """Return the function from the number of an optimizer step (the first is 0) to the rate of each parameter group.

    Args:
        config: Peak rates, schedule, warm-up.
        groups: Fields of `train.learning_rate`.
        total_steps: Steps of the whole run.

    Raises:
        UserError: As `rate_factor`.
    """
    warmup, options = warmup_steps(config, total_steps), config.schedule_options
    peaks = {group: getattr(config.learning_rate, group) for group in groups}
    factors = {group: rate_factor(config.schedule, options, peak, warmup, total_steps) for group, peak in peaks.items()}
    return lambda step: {group: factors[group](step) * peak for group, peak in peaks.items()}


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)


def _nearest_multiples(number: int, unit: int) -> str:
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)

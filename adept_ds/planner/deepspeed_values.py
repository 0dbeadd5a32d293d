"""The values of a completed `deepspeed` section, as DeepSpeed's own classes take them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from adept_ds.config.base import validation_problems
from adept_ds.config.deepspeed import DeepSpeedPlan, shown
from adept_ds.contexts import attribute_set
from adept_ds.distributed import rank_count
from adept_ds.errors import UserError


def check_deepspeed_values(section: Mapping[str, Any], plan: DeepSpeedPlan) -> None:
    """Hand a section to DeepSpeed as `deepspeed.initialize` will, before anything is loaded.

    Args:
        section: What the run's config says.
        plan: The section completed.

    Raises:
        UserError: All keys of the section with values that DeepSpeed does not take.
    """
    whole = plan.config
    if _refusal(whole) is None:
        return
    # DeepSpeed seldom names the key. So its own keys are added one by one to what is filled in.
    leaves = [(key, value) for key, value in _leaves(section) if ".".join(key) not in plan.derived]
    accepted = copy.deepcopy(whole)
    for key, _ in leaves:
        _remove(accepted, key)
    problems = []
    for key, value in leaves:
        tried = copy.deepcopy(accepted)
        _put(tried, key, value)
        reason = _refusal(tried)
        if reason is None:
            accepted = tried
        else:
            problems.append(f"deepspeed.{'.'.join(key)} is {shown(value)}, which DeepSpeed does not take: {reason}")
    raise UserError("\n".join(problems or [f"DeepSpeed does not take the section deepspeed: {_refusal(whole)}"]))


def _refusal(config: dict[str, Any]) -> str | None:
    """What DeepSpeed has against a config; None if it takes it."""
    own = copy.deepcopy(config)
    # It compares the batch with the ranks that it knows of, which need not be those that are planned for.
    own["train_batch_size"] = (
        own["train_micro_batch_size_per_gpu"] * own["gradient_accumulation_steps"] * _ranks_that_deepspeed_knows()
    )
    try:
        with attribute_set(logging.getLogger("DeepSpeed"), "disabled", True):
            DeepSpeedConfig(own)
    except ValidationError as error:
        return validation_problems(error)
    except Exception as error:  # It asserts, and calls methods of values of the wrong type.
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def _ranks_that_deepspeed_knows() -> int:
    from deepspeed import comm

    return rank_count() if comm.is_initialized() else 1


def _leaves(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, name))
        else:
            yield (*above, name), value


def _remove(values: dict[str, Any], key: tuple[str, ...]) -> None:
    *parents, name = key
    for parent in parents:
        values = values.get(parent, {})
    values.pop(name, None)


def _put(values: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    *parents, name = key
    for parent in parents:
        values = values.setdefault(parent, {})
    values[name] = value

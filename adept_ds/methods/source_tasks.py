"""Which parameters of an adapter of several tasks another run's tasks start from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adept_ds.config.method import TaskStartSettings
from adept_ds.errors import UserError, did_you_mean
from adept_ds.storage.adapter_folder import Adapter


def source_number(key: str, task: str, source: Adapter) -> int:
    """Number of a task among those of the source.

    Args:
        key: Setting that names it.
        task: Its name.
        source: An adapter whose method has `tasks`.

    Raises:
        UserError: The source has no such task.
    """
    theirs = source.method.prompt_tasks
    if task not in theirs:
        raise UserError(
            f"{key} is {task!r}; the adapter {source.folder} has parameters of "
            f"{', '.join(theirs) or 'one task, which it does not name'}{did_you_mean(task, theirs)}"
        )
    return theirs.index(task)


def for_own_tasks(values: Tensor, source: Adapter, config: TaskStartSettings) -> Tensor:
    """Return of the source's tasks' values [n, ...] those that the settings' tasks start from, in their order.

    A source of one task serves all. Of one with several, every task starts from `task_from`, or from its own name.

    Raises:
        UserError: The source has no task of that name.
    """
    return values[_numbers(source, config)]


def _numbers(source: Adapter, config: TaskStartSettings) -> list[int]:
    theirs: Any = source.method.prompt_tasks
    count = max(1, len(config.tasks))
    if config.task_from is not None:
        return count * [source_number("method.task_from", config.task_from, source)]
    if not theirs:
        return count * [0]
    if not config.tasks:
        raise UserError(
            f"method.init_from is {str(source.folder)!r}, which has parameters of {', '.join(theirs)}; set "
            "method.task_from to the one to start from"
        )
    return [source_number("method.tasks without method.task_from", task, source) for task in config.tasks]

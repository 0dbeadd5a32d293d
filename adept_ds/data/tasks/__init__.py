"""Text-to-text tasks: the registry, a user's own, where their rows come from, and which of them train."""

from adept_ds.data.tasks.examples import (
    TaskExamples,
    check_own_parameters,
    count_training_examples,
    load_task_examples,
    longest_lengths,
)
from adept_ds.data.tasks.registry import TASKS
from adept_ds.data.tasks.task import Part, Task, TaskExample, cut_references
from adept_ds.data.tasks.task_file import find_task

__all__ = [
    "TASKS",
    "Part",
    "Task",
    "TaskExample",
    "TaskExamples",
    "check_own_parameters",
    "count_training_examples",
    "cut_references",
    "find_task",
    "load_task_examples",
    "longest_lengths",
]

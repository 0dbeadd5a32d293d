"""The examples of a run's tasks: rows become texts only when they are read, so a large data set stays in its table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from adept_ds.config.run import DataConfig
from adept_ds.data.tasks.prepare import texts
from adept_ds.data.tasks.sources import RawSplit, read_split
from adept_ds.data.tasks.splits import EQUAL, k_shot, part_indices, proportional, round_robin, shares, tempered
from adept_ds.data.tasks.task import Part, Task, TaskExample
from adept_ds.data.tasks.task_file import find_task
from adept_ds.errors import UserError, did_you_mean
from adept_ds.formats.records import TokenLimits


@dataclass(frozen=True)
class TaskPart:
    """One task's examples of one part."""

    task: Task
    part: Part
    raw: RawSplit
    rows: np.ndarray
    """Row of each example in `raw`."""
    answers: np.ndarray | None
    """For a row that is one example per answer: which answer. None if every row is one example."""
    limits: TokenLimits

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, members: np.ndarray) -> Iterator[TaskExample]:
        """Yield the examples at `members`, in their order."""
        rows = self.rows[members]
        answers = np.zeros(len(members), int) if self.answers is None else self.answers[members]
        for number, answer, raw_row in zip(rows, answers, self.raw.rows(rows), strict=True):
            row = self.task.prepared(raw_row)
            targets = self.task.targets(row)
            task_id = f"{self.task.name}/{self.part}/{number}"
            references = self.task.right_answers(row)
            if self.answers is not None:
                task_id += f"/{answer}"
                if self.task.first_reference_only:
                    references = (targets[answer],)
            yield TaskExample(
                task_id,
                self.task.show(row),
                targets[answer],
                limits=self.limits,
                task=self.task,
                references=references,
            )


class TaskExamples(Sequence[TaskExample]):
    """The examples of one or several tasks, in a given order, some perhaps several times.

    Args:
        parts: The tasks' examples.
        members: The sequence, as positions among the examples of all parts, one part after another.
    """

    def __init__(self, parts: Sequence[TaskPart], members: np.ndarray) -> None:
        self.parts = parts
        self.members = members

    def __len__(self) -> int:
        return len(self.members)

    @overload
    def __getitem__(self, index: int) -> TaskExample: ...
    @overload
    def __getitem__(self, index: slice) -> TaskExamples: ...
    def __getitem__(self, index: int | slice) -> TaskExample | TaskExamples:
        if isinstance(index, slice):
            return TaskExamples(self.parts, self.members[index])
        return next(self._read(self.members[[index]]))

    def __iter__(self) -> Iterator[TaskExample]:
        boundaries = np.flatnonzero(np.diff(self._part_of(self.members))) + 1
        for stretch in np.split(self.members, boundaries):
            yield from self._read(stretch)

    def unique(self) -> tuple[TaskExamples, np.ndarray]:
        """Return every example once, in the order of the tables, and where each of this sequence is among them."""
        members, positions = np.unique(self.members, return_inverse=True)
        return TaskExamples(self.parts, members), positions

    def by_task(self) -> list[TaskExamples]:
        """Return the examples of each task that has any, in their order."""
        part = self._part_of(self.members)
        return [TaskExamples(self.parts, self.members[part == number]) for number in np.unique(part)]

    def counts(self) -> list[str]:
        """Return a line on how many examples each of several tasks has; none for one task."""
        if len(self.parts) < 2:
            return []
        of_part = np.bincount(self._part_of(self.members), minlength=len(self.parts))
        texts = [
            f"{count:,} of {part.task.name}" + (f" ({len(part):,} different ones)" if count > len(part) else "")
            for count, part in zip(of_part, self.parts, strict=True)
        ]
        return [f"examples of each task: {', '.join(texts)}"]

    def _part_of(self, members: np.ndarray) -> np.ndarray:
        ends = np.cumsum([len(part) for part in self.parts])
        return np.searchsorted(ends, members, side="right")

    def _read(self, members: np.ndarray) -> Iterator[TaskExample]:
        """Read a stretch that lies in one part."""
        if len(members):
            number = int(self._part_of(members[:1])[0])
            start = sum(len(part) for part in self.parts[:number])
            yield from self.parts[number].read(members - start)


def load_task_examples(cfg: DataConfig, part: Part) -> TaskExamples:
    """Return the examples of a part of the run's tasks.

    Training examples are mixed as `data.mixture` says; those of other parts come in turns, so that the first so many
    are of all tasks. A task of the user's own without a file for a part has none there.

    Raises:
        UserError: A task is unknown or declared wrongly, or its data is not there, malformed or too small.
    """
    tasks = [find_task(name).variant(cfg.variant) for name in cfg.tasks]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.tasks: two tasks are called {name!r}; expected names that differ")
    parts = [load_part(task, part, cfg) for task in tasks if not task.files or task.split_name(part) in task.files]
    sizes = [len(one) for one in parts]
    if not sizes:
        members = np.arange(0)
    elif part != "train":
        members = round_robin(sizes)
    else:
        temperature = _temperature(cfg)
        members = proportional(sizes) if temperature is None else tempered(sizes, temperature, cfg.split_seed)
    return TaskExamples(parts, members)


def _temperature(cfg: DataConfig) -> float | None:
    """That of the mixture; None where every example comes once, in the order of the tasks."""
    return {"proportional": None, "equal": EQUAL, "temperature": cfg.mixture_temperature}[cfg.mixture]


def load_part(task: Task, part: Part, cfg: DataConfig) -> TaskPart:
    """Return one task's examples of a part; of its training part, the k-shot sample where one is asked for.

    Raises:
        UserError: As `load_task_examples`.
    """
    raw = read_split(task, task.split_name(part), cfg.path, cfg.hub_ids)
    rows = part_indices(task, part, len(raw), cfg.split_seed)
    answers = None
    if task.example_per_answer == "always" or (task.example_per_answer == "train" and part == "train"):
        counts = [len(texts(row, task.target)) for row in map(task.prepared, raw.rows(rows))]
        answers = np.concatenate([np.arange(count) for count in counts])
        rows = np.repeat(rows, counts)
    if part == "train" and cfg.k_shot is not None:
        words = [task.label_word(task.prepared(row)) for row in raw.rows(rows)] if task.labels else None
        drawn = k_shot(task, words, len(rows), cfg.k_shot, cfg.k_shot_seed)
        rows, answers = rows[drawn], None if answers is None else answers[drawn]
    limits = TokenLimits(
        prompt=cfg.max_source_length or task.max_source_length,
        target=task.max_target_tokens(cfg.max_target_length),
    )
    return TaskPart(task, part, raw, rows, answers, limits)


def check_own_parameters(cfg: DataConfig, own: Sequence[str]) -> list[str]:
    """Return a sentence on the tasks with parameters of their own (`method.tasks`) that are not trained on, if any.

    Raises:
        UserError: A task of the run's has none of these parameters, where others have.
    """
    if not own:
        return []
    names = [find_task(name).name for name in cfg.tasks]
    for name in names:
        if name not in own:
            raise UserError(
                f"method.tasks is {list(own)}, and data.tasks has {name!r}, which would have no parameters"
                + did_you_mean(name, own)
            )
    unused = [name for name in own if name not in names]
    return [f"not in data.tasks, so their parameters stay as they start: {', '.join(unused)}"] if unused else []


def longest_lengths(cfg: DataConfig) -> tuple[int, int]:
    """Return the longest source and target in tokens that the run's tasks allow, without a soft prompt.

    Label words, which are never cut, are taken to be no longer than other targets may be.

    Raises:
        UserError: A task is unknown or declared wrongly.
    """
    tasks = [find_task(name).variant(cfg.variant) for name in cfg.tasks]
    return (
        cfg.max_source_length or max(task.max_source_length for task in tasks),
        cfg.max_target_length or max(task.max_target_length for task in tasks),
    )


def count_training_examples(cfg: DataConfig) -> tuple[int | None, str]:
    """Return the number of training examples, and where it is known from, without fetching anything.

    Local files are read; of a data set of the hub the released size is given, if it is known.

    Raises:
        UserError: A task is unknown or declared wrongly, or its local files are malformed.
    """
    tasks = [find_task(name).variant(cfg.variant) for name in cfg.tasks]
    if (cfg.path is not None and Path(cfg.path).exists()) or all(task.files for task in tasks):
        count = len(load_task_examples(cfg, "train"))
        return count, f"{count:,} for training in the files of {', '.join(task.name for task in tasks)}"
    sizes = [task.train_size if cfg.k_shot is None else cfg.k_shot for task in tasks]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None, f"unknown before {', '.join(cfg.tasks)} is loaded"
    count = sum(shares(known, _temperature(cfg) or 1))
    return count, f"{count:,} for training in the released data of {', '.join(cfg.tasks)}, by its documentation"

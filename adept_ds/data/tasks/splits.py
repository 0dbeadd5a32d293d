"""Which rows of a data set are whose: seeded permutations, k-shot samples, mixtures of tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from adept_ds.data.tasks.task import Part, Task
from adept_ds.errors import UserError

VALIDATION_SIZE = 1_000
"""Training examples that become validation under the rule `1k`."""


def permutation(size: int, seed: int) -> np.ndarray:
    """Return the permutation of 0 to `size` - 1 that all splits are cut from."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy()


def part_indices(task: Task, part: Part, size: int, seed: int) -> np.ndarray:
    """Return the rows of `part`, as indices into the `size` rows of the split that it is taken from.

    - `half`: the first half of the permuted validation split is validation, the rest test; train is all of train.
    - `1k`: the first 1,000 of the permuted training split are validation, what follows is train, up to `train_limit`;
      test is a split of its own.
    - `own`: every part is a split of its own.

    Raises:
        UserError: The split is too small to be cut.
    """
    if task.splits == "half" and part != "train":
        if size < 2:
            raise UserError(f"task {task.name}: {size} validation example cannot be halved into validation and test")
        order = permutation(size, seed)
        return order[: size // 2] if part == "validation" else order[size // 2 :]
    if task.splits == "1k" and part != "test":
        if size <= VALIDATION_SIZE:
            raise UserError(
                f"task {task.name}: {VALIDATION_SIZE:,} of its training examples become validation, and it has "
                f"{size:,}; expected more"
            )
        order = permutation(size, seed)
        if part == "validation":
            return order[:VALIDATION_SIZE]
        return order[VALIDATION_SIZE:][: task.train_limit]
    return np.arange(size)[: task.train_limit if part == "train" else None]


def k_shot(task: Task, words: Sequence[str] | None, size: int, k: int, seed: int) -> np.ndarray:
    """Draw `k` of `size` training examples, balanced over the labels, as sorted positions.

    Every label has k / labels examples; what does not divide goes to labels that are drawn too.

    Args:
        task: For messages and its label words.
        words: Each example's label word; None for a task without labels, which is sampled as a whole.
        size: Number of training examples.
        k: How many to draw, over all labels.
        seed: Another seed gives another sample.

    Raises:
        UserError: There are too few examples, of one label or in all.
    """
    order = permutation(size, seed)
    if words is None:
        if size < k:
            raise UserError(f"task {task.name}: data.k_shot is {k}, and it has {size} training examples")
        return np.sort(order[:k])
    labels = np.array(task.label_words)
    generator = np.random.default_rng(seed)
    shares = dict.fromkeys(task.label_words, k // len(labels))
    for word in generator.permutation(labels)[: k % len(labels)]:
        shares[str(word)] += 1
    shuffled = np.array(words)[order]
    drawn = []
    for word, share in shares.items():
        of_label = order[shuffled == word]
        if len(of_label) < share:
            raise UserError(
                f"task {task.name}: data.k_shot {k} takes {share} examples of label {word!r}, and it has "
                f"{len(of_label)} for training"
            )
        drawn.append(of_label[:share])
    return np.sort(np.concatenate(drawn))


def proportional(sizes: Sequence[int]) -> np.ndarray:
    """Return the members of one pass over several tasks, each as often as it has examples: all, once."""
    return np.arange(sum(sizes))


def shares(sizes: Sequence[int], temperature: float) -> list[int]:
    """Return how often each task comes in one pass in which its share is proportional to size ** (1 / temperature).

    The largest task has each of its examples once, and a smaller one its own at least once: at temperature 1 each task
    has its size, and towards infinity all have that of the largest.
    """
    largest = max(sizes)
    return [round(largest * (size / largest) ** (1 / temperature)) if size else 0 for size in sizes]


def tempered(sizes: Sequence[int], temperature: float, seed: int) -> np.ndarray:
    """Return the members of one pass over several tasks with their `shares`.

    A task is repeated whole as often as it goes, and the remainder is drawn. Members count through the tasks.
    """
    members, start = [], 0
    for size, share in zip(sizes, shares(sizes, temperature), strict=True):
        members.append(np.resize(start + permutation(size, seed), share))
        start += size
    return np.concatenate(members)


EQUAL = math.inf
"""The temperature at which all tasks have the same share."""


def round_robin(sizes: Sequence[int]) -> np.ndarray:
    """Return the members of several tasks in turns, so that a first so many has as many of each as can be."""
    turns = np.concatenate([np.arange(size) for size in sizes])
    return np.argsort(turns, kind="stable")

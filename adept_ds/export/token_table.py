"""What a method that depends on the token alone makes of a backbone's input table.

With the table E [V, d], the offset f and the prompt P [l, d], the input table of the tuned model is

    T[v] = E[v] + f(E[v])   for a token v        T[p_i] = P[i]   for prompt token i

which is what the method's embedding returns for the ids v and V + i. Where the backbone's layer multiplies its rows by
s, as Gemma's does, T holds those vectors divided by s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adept_ds.backbone.table import OpenTable, row_scale
from adept_ds.errors import UserError, did_you_mean
from adept_ds.methods import Method, create_method
from adept_ds.methods.base import load_values
from adept_ds.methods.soft_prompt import PromptedEmbedding
from adept_ds.storage.adapter_folder import Adapter

CHUNK = 4_096
"""Rows that are computed at once."""


def loaded_method(adapter: Adapter, opened: OpenTable) -> Method:
    """Return the adapter's method, in a backbone that has its input table alone.

    Raises:
        UserError: The adapter does not fit its own settings.
    """
    method = create_method(adapter.method)
    method.inject(opened.backbone, None, None)
    load_values(method, adapter.tensors)
    return method


def task_number(adapter: Adapter, task: str | None) -> int:
    """Number of the task whose parameters are exported or read with; 0 where there is one set for everything.

    Raises:
        UserError: The adapter has parameters of each of several tasks and `task` is none of them, or it has one set
            alone.
    """
    tasks = adapter.method.prompt_tasks
    if not tasks and task is None:
        return 0
    if task not in tasks:
        known = f"parameters of each of {', '.join(tasks)}" if tasks else "one set of parameters for everything"
        given = "missing" if task is None else repr(task)
        raise UserError(f"--task is {given}; {adapter.folder} has {known}{did_you_mean(task or '', tasks)}")
    return tasks.index(task)


@dataclass(frozen=True)
class TokenTable:
    """The vectors of a method's embedding, where the prompt tokens have ids of a tokenizer."""

    embedding: PromptedEmbedding
    prompt_ids: Sequence[int]
    """Ids of the prompt's tokens in order; their rows are those of the prompt, whatever stood there."""
    first_vector: int
    """Number of the prompt's first vector, among those of all tasks."""
    rows: int
    """Rows of the new table: V, or more."""
    scale: float
    """What the backbone's layer multiplies rows by."""

    @classmethod
    def of(cls, method: Any, prompt_ids: Sequence[int], task: int) -> TokenTable:
        """Of a method that has an embedding, for the prompt of a task."""
        embedding = method.embedding.eval()
        vocabulary = embedding.num_embeddings
        rows = max([vocabulary - 1, *prompt_ids]) + 1
        return cls(embedding, prompt_ids, task * len(prompt_ids), rows, row_scale(embedding.table))

    @torch.no_grad()
    def vectors(self, ids: Tensor) -> Tensor:
        """What is to stand in the rows `ids` [n] of the table: fp32 [n, d]. Rows that nothing has are zero."""
        vocabulary = self.embedding.num_embeddings
        own, is_spare = ids.clone(), ids >= vocabulary
        for number, prompt_id in enumerate(self.prompt_ids):
            own[ids == prompt_id] = vocabulary + self.first_vector + number
            is_spare &= ids != prompt_id
        values = self.embedding(own.masked_fill(is_spare, 0)).float() / self.scale
        return values.masked_fill(is_spare[:, None], 0)

    def parts(self) -> Iterator[Tensor]:
        """The table from its first row to its last."""
        for ids in torch.arange(self.rows).split(CHUNK):
            yield self.vectors(ids)


def mean_row(table: Tensor, left_out: Iterable[int]) -> Tensor:
    """Return the mean of the rows of a table [V, d], but for some: fp32 [d].

    As a row of a head it never has the largest logit: the mean of the logits is below the largest of them.
    """
    rows = torch.zeros(table.shape[1], dtype=torch.float64)
    for part in table.split(CHUNK):
        rows += part.double().sum(0)
    others = [number for number in set(left_out) if number < len(table)]
    rows -= table[others].double().sum(0)
    return (rows / (len(table) - len(others))).float()


def lengthened(table: Tensor, rows: int, replaced: Sequence[int], row: Tensor) -> Iterator[Tensor]:
    """Give a table [V, d] or a vector [V] with so many rows: those of `replaced`, and the new ones, are `row`."""
    for ids in torch.arange(rows).split(CHUNK):
        values = table[ids.clamp(max=len(table) - 1)].float()
        is_new = (ids >= len(table)) | torch.isin(ids, torch.tensor(replaced, dtype=ids.dtype))
        values[is_new] = row
        yield values

"""The tensors of a checkpoint that have a row for each token, and what becomes of them with more tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adept_ds.backbone.table import OpenTable
from adept_ds.errors import UserError
from adept_ds.export.checkpoint import NAMES, Made
from adept_ds.export.token_table import lengthened, mean_row

NEVER = -1e4
"""Bias of a row of the head that is never to be chosen."""


@dataclass(frozen=True)
class Changes:
    """What is written in place of tensors of a checkpoint, beside them, and in its config."""

    changed: dict[str, Made] = field(default_factory=dict)
    added: dict[str, Made] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


class Vocabulary:
    """The tables of a checkpoint.

    Args:
        opened: The checkpoint.
        dtype: What is written.

    Raises:
        UserError: Something else of the checkpoint goes by tokens, or its table and head are one tensor by the name of
            the head.
    """

    def __init__(self, opened: OpenTable, dtype: torch.dtype) -> None:
        self._opened, self._type = opened, NAMES[dtype]
        backbone = opened.backbone
        self.config: Any = backbone.config
        modules = {id(module): name for name, module in backbone.named_modules(remove_duplicate=False)}
        head = backbone.get_output_embeddings()
        self.head_name = f"{modules[id(head)]}.weight"
        self.bias_name = f"{modules[id(head)]}.bias" if getattr(head, "bias", None) is not None else None
        self.table_name = f"{modules[id(opened.table)]}.weight"
        state = backbone.state_dict(keep_vars=True)
        self.table_names = [
            name for name, value in state.items() if value is opened.table.weight and name != self.head_name
        ]
        self.table = opened.weights.read(opened.name_of(opened.table.weight), opened.files)
        # The checkpoint decides what is tied, as in loading: see `adept_ds.backbone.streaming`.
        self.is_tied = self.head_name not in opened.weights.sources
        self.head = self.table if self.is_tied else opened.weights.read(self.head_name, opened.files)
        self._check()

    def _check(self) -> None:
        opened, name = self._opened, self.config.name_or_path
        if not any(name in opened.weights.sources for name in self.table_names):
            raise UserError(
                f"the checkpoint {name!r} has its input table under the name of its head; expected one of "
                f"{', '.join(self.table_names)}: load it by transformers and save it anew"
            )
        handled = {opened.tensor_of(one) for one in (*self.table_names, self.head_name, self.bias_name or "")}
        size = len(self.table)
        others = [one for one in opened.files.names() if one not in handled and size in opened.files.shape(one)]
        if others:
            raise UserError(
                f"the checkpoint {name!r} has {others[0]} of shape {list(opened.files.shape(others[0]))}, which seems "
                f"to have an entry for each of its {size} tokens, and cannot be given more; expected a backbone with a "
                "table and a head alone"
            )

    def folded(self, parts: Callable[[], Iterator[Tensor]], rows: int, prompt_ids: Sequence[int]) -> Changes:
        """The input table becomes another one, with so many rows, while all other uses of it stay as they were.

        A head that was tied to it gets the old table of its own. Its rows of the prompt's tokens are the mean of the
        others, which is never the largest; those of a head with biases are zero, with a bias far below.
        """
        changes = Changes(config={"vocab_size": rows, "tie_word_embeddings": False})
        for name in self.table_names:
            is_input = name == self.table_name
            self._put(changes, name, rows, parts if is_input else self._old_table(rows, prompt_ids))
        scale = 1.0
        if getattr(self.config, "scale_decoder_outputs", False):
            # T5 multiplies before a head that is tied; older readers know it by the tie alone.
            scale = self.config.d_model**-0.5
            changes.config["scale_decoder_outputs"] = False
        self._put_head(changes, rows, prompt_ids, scale)
        return changes

    def longer(self, rows: int, prompt_ids: Sequence[int]) -> Changes:
        """Table and head get more rows, of which none is ever the largest; what is tied stays so."""
        changes = Changes(config={"vocab_size": rows})
        for name in self.table_names:
            if name in self._opened.weights.sources:
                self._put(changes, name, rows, self._old_table(rows, prompt_ids))
        if not self.is_tied:
            self._put_head(changes, rows, prompt_ids, 1.0)
        return changes

    def _old_table(self, rows: int, prompt_ids: Sequence[int]) -> Callable[[], Iterator[Tensor]]:
        mean = mean_row(self.table, prompt_ids)
        return lambda: lengthened(self.table, rows, prompt_ids, mean)

    def _put_head(self, changes: Changes, rows: int, prompt_ids: Sequence[int], scale: float) -> None:
        head = self.head
        row = torch.zeros(head.shape[1]) if self.bias_name else mean_row(head, prompt_ids)

        def parts() -> Iterator[Tensor]:
            return (part * scale for part in lengthened(head, rows, prompt_ids, row))

        self._put(changes, self.head_name, rows, parts)
        if self.bias_name:
            bias, never = self._opened.weights.read(self.bias_name, self._opened.files), torch.tensor(NEVER)
            self._put(changes, self.bias_name, rows, lambda: lengthened(bias, rows, prompt_ids, never))

    def _put(self, changes: Changes, name: str, rows: int, parts: Callable[[], Iterable[Tensor]]) -> None:
        is_vector = name == self.bias_name
        made = Made(self._type, (rows,) if is_vector else (rows, self.table.shape[1]), parts)
        stored = self._opened.tensor_of(name)
        if stored is None:
            changes.added[name] = made
        else:
            changes.changed[stored] = made


def refuse_composite(opened: OpenTable) -> None:
    """Refuse a checkpoint that holds more than a language model.

    Raises:
        UserError: It does.
    """
    if type(opened.checkpoint) is not type(opened.backbone.config):
        raise UserError(
            f"{opened.backbone.config.name_or_path!r} is a checkpoint of model type {opened.checkpoint.model_type!r}, "
            "with more than a language model in it, which cannot be exported; expected a language model alone"
        )

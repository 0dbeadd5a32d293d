"""Rows in which examples stand one behind another, each with its own soft prompt in front.

The backbone gets them without an attention mask and with positions that begin at 0 for each example. From such
positions `transformers` makes attention that is blocked between examples: a mask [R, 1, S, S] for eager and sdpa, a
block mask for flex attention. Flash attention is told where examples begin. Behind a row's last example every position
is 0, so that it needs none that the backbone may not have.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.generic import is_flash_attention_requested

from adept_ds.model.loss import IGNORE_INDEX, shift_labels


class PackedRows:
    """Packed rows [R, S] of a batch in the form in which the backbone reads them.

    Flash attention knows of sequences of different lengths only where all stand in one row: for it the form is
    [1, R S], one row behind another.

    Args:
        input_ids: Token ids [R, S].
        is_token: 1 for tokens, 0 in the room for soft prompts and behind the last example [R, S].
        example_ids: Which of its row's examples a position is of, from 1 on, 0 behind the last [R, S].
        num_virtual_tokens: Length l of the soft prompt; the first l positions of each example are room for it.
        attention: Name of the backbone's attention.
    """

    def __init__(
        self, input_ids: Tensor, is_token: Tensor, example_ids: Tensor, num_virtual_tokens: int, attention: str | None
    ) -> None:
        (rows, columns), device = input_ids.shape, input_ids.device
        self._is_one_row = is_flash_attention_requested(requested_attention_implementation=attention)
        self._row_size, self._length = columns, num_virtual_tokens
        self._place = (example_ids - 1).clamp(min=0)
        self._is_first = self._formed(F.pad(example_ids.diff(dim=1) != 0, (1, 0), value=True))
        if self._is_one_row:
            # Numbers that no other row has; so many examples fit into one.
            others = columns // (num_virtual_tokens + 1) * torch.arange(rows, device=device)[:, None]
            example_ids = torch.where(example_ids > 0, example_ids + others, 0)
        self.example_ids = self._formed(example_ids)
        """Number of each position's example, the same for no other of its row; 0 behind the last."""
        index = torch.arange(self.example_ids.shape[1], device=device)
        self._start = torch.where(self._is_first, index, 0).cummax(1).values
        self.position_ids = (index - self._start).masked_fill(self.example_ids == 0, 0)
        """Positions within the examples."""
        self._input_ids, self._is_token = self._formed(input_ids), self._formed(is_token).bool()

    def _formed(self, values: Tensor) -> Tensor:
        return values.flatten()[None] if self._is_one_row else values

    def of_positions(self, values: Tensor) -> Tensor:
        """Return for each position its example's of the values of each row's examples [R, N], or of rows [R]."""
        of_examples = values if values.dim() == 2 else values[:, None].expand_as(self._place)
        return self._formed(of_examples.gather(1, self._place))

    def with_prompts(self, first_id: int, prompts: Tensor) -> Tensor:
        """Return the ids with token i of prompt k, which is `first_id` + k l + i, in the room for it; `prompts` are the
        numbers k of each position's prompt."""
        is_prompt = (self.example_ids > 0) & (self.position_ids < self._length)
        return torch.where(is_prompt, first_id + self._length * prompts + self.position_ids, self._input_ids)

    def targets(self, labels: Tensor) -> Tensor:
        """Return the token that each position predicts, of labels [R, S]; the last of an example predicts nothing."""
        return shift_labels(self._formed(labels).masked_fill(self.position_ids == 0, IGNORE_INDEX))

    def context(self, labels: Tensor | None, chosen: Tensor | None = None) -> Tensor:
        """Return true at the `chosen` tokens [R, S]; if none are given, at those of an example in front of its first
        label, of labels [R, S], and at all tokens if there are none either."""
        if chosen is not None:
            return self._is_token & self._formed(chosen).bool()
        if labels is None:
            return self._is_token
        is_label = self._formed(labels) != IGNORE_INDEX
        until = is_label.cumsum(1)
        in_earlier_examples = (until - is_label.long()).gather(1, self._start)
        return self._is_token & (until == in_earlier_examples)

    def arguments(self) -> dict[str, Any]:
        """Return what the backbone takes beside the ids. It must have no cache, which hides from `transformers` that
        rows are packed."""
        arguments: dict[str, Any] = {"position_ids": self.position_ids}
        if self._is_one_row:
            # Otherwise each layer finds them out anew, and waits for the device to do so.
            starts = self._is_first[0].nonzero()[:, 0]
            ends = F.pad(starts, (0, 1), value=self._is_first.shape[1]).to(torch.int32)
            arguments |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
            arguments |= {"max_length_q": self._row_size, "max_length_k": self._row_size}
        return arguments

"""A rank's share of a global batch as tensors: rows of one example each, or packed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from adept_ds.config.batch import BatchArithmetic
from adept_ds.data.batches import pack_rows, rank_micro_batches, rank_rows
from adept_ds.data.encode import Encoded, EncodedDataset, collate, collate_packed
from adept_ds.model.loss import IGNORE_INDEX


class MicroBatches:
    """Makes the micro-batches of optimizer steps.

    Args:
        examples: What is trained on.
        arithmetic: How a global batch is split. No example is longer, with its prompt, than a packed row.
        num_virtual_tokens: Length of the soft prompt in front of each example.
        pad_token_id: Id in places without a token.
    """

    def __init__(
        self,
        examples: EncodedDataset | Sequence[Encoded],
        arithmetic: BatchArithmetic,
        num_virtual_tokens: int,
        pad_token_id: int,
    ) -> None:
        self._examples = examples
        self._arithmetic = arithmetic
        self._prompt = num_virtual_tokens
        self._pad = pad_token_id
        lengths = examples.lengths if isinstance(examples, EncodedDataset) else [len(one.input_ids) for one in examples]
        self._sizes = [num_virtual_tokens + length for length in lengths]

    def of_rank(self, batch: Sequence[int], rank: int) -> list[dict[str, Tensor]]:
        """Return a rank's micro-batches of a global batch, of which all ranks have equally many."""
        if self._arithmetic.packing is None:
            return [self._padded(indices) for indices in self._shares(batch, rank)]
        return [self._packed(rows) for rows in self._row_shares(batch, rank)]

    def without_labels(self) -> dict[str, Tensor]:
        """Return a micro-batch of which nothing is learnt."""
        return self._padded([]) if self._arithmetic.packing is None else self._packed([[]])

    def padding(self, batches: Iterable[Sequence[int]]) -> float:
        """Return the share of all positions that are neither token nor soft prompt, of global batches on all ranks."""
        positions = filled = 0
        for batch in batches:
            filled += sum(self._sizes[index] for index in batch)
            for rank in range(self._arithmetic.world_size):
                positions += self._positions(batch, rank)
        return 1 - filled / positions

    def _positions(self, batch: Sequence[int], rank: int) -> int:
        if self._arithmetic.packing is not None:
            return sum(len(rows) * self._arithmetic.packing for rows in self._row_shares(batch, rank))
        shares = filter(None, self._shares(batch, rank))
        return sum(len(share) * max(self._sizes[index] for index in share) for share in shares)

    def _shares(self, batch: Sequence[int], rank: int) -> list[list[int]]:
        own = self._arithmetic
        return rank_micro_batches(batch, rank, own.world_size, own.micro_batch_size, own.gradient_accumulation_steps)

    def _row_shares(self, batch: Sequence[int], rank: int) -> list[list[list[int]]]:
        own = self._arithmetic
        assert own.packing is not None
        return rank_rows(pack_rows(batch, self._sizes, own.packing), rank, own.world_size, own.micro_batch_size)

    def _padded(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Rows of one example each. None at all gives an example without labels, so that a rank with nothing to do
        makes the same calls as the others."""
        batch = collate([self._examples[index] for index in indices or [0]], self._pad)
        if not indices:
            batch["labels"].fill_(IGNORE_INDEX)
        return batch

    def _packed(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Packed rows, of which some may be empty."""
        packing = self._arithmetic.packing
        assert packing is not None
        return collate_packed([[self._examples[i] for i in row] for row in rows], packing, self._prompt, self._pad)

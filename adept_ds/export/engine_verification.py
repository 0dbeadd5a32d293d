"""Whether a file for an engine computes what the live model computes, by what the engine itself says.

A worker reads the live model's texts with the engine, in a process of its own, and tells the best logits at every
token. Where the best token is the live model's at each, so is the engine's greedy text. Engines give logits of some
tokens alone, and some as logarithms of probabilities, so they are compared up to a constant, which no probability
depends on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adept_ds.export.verification import Agreement, Batch, comparable, is_tie, real_tokens

Best = Sequence[tuple[int, float]]
"""Ids and logits of the best tokens, best first."""


def compare_engine(
    batches: Sequence[Batch], best: Sequence[Sequence[Best]], prompt_ids: Sequence[int], limit: float
) -> Agreement:
    """Compare an engine with the live model.

    Args:
        batches: What the live model did.
        best: What the engine found, for each prompt of all batches and each token that the live model generated.
        prompt_ids: The prompt's tokens, which must never be the best.
        limit: Largest difference of logits that counts as rounding, as a part of the largest logit.
    """
    differing = ties = 0
    difference = largest = 0.0
    rows = [(batch, row) for batch in batches for row in range(len(batch.rows))]
    for (batch, row), found in zip(rows, best, strict=True):
        written = batch.written[row]
        real = real_tokens(batch.logits.shape[-1], prompt_ids)
        end = comparable(written, real)
        for place in range(min(end + 1, len(written))):
            live = batch.logits[row, place]
            difference = max(difference, _apart(live, real, found[place]))
            largest = max(largest, float(live[real].abs().max()))
        chosen = torch.tensor([int(at[0][0]) for at in found])
        unequal = (chosen[:end] != written[:end]).nonzero().flatten().tolist()
        if unequal:
            first = unequal[0]
            is_even = is_tie(batch.logits[row, first], real, int(chosen[first]), limit)
            ties, differing = ties + is_even, differing + (not is_even)
    return Agreement(len(rows), batches[0].written.shape[1], differing, ties, difference, limit * largest, largest)


def _apart(live: Tensor, real: Tensor, best: Best) -> float:
    """Largest difference of logits, but for a constant; infinite where there is nothing to compare."""
    known = set(real.tolist())
    pairs = [(float(live[number]), logit) for number, logit in best if number in known]
    if not pairs:
        return float("inf")
    apart = torch.tensor(pairs, dtype=torch.float64).diff(dim=1)
    apart = (apart - apart.mean()).abs()
    return float(apart.max()) if torch.isfinite(apart).all() else float("inf")

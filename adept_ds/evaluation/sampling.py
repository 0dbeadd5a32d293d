"""The next token of each row: the likeliest, or drawn from the row's own random stream."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adept_ds.config.run import GenerationConfig

CANDIDATES = 256
"""Likeliest tokens that are sorted first. Nearly always the kept ones are among them; else the whole vocabulary is
sorted, which takes seventeen times as long."""


def sample_seed(seed: int, task_id: str, index: int) -> int:
    """Seed of one sample's random stream."""
    digest = hashlib.sha256(f"{seed}/{task_id}/{index}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


@dataclass(frozen=True)
class Sampling:
    """Which tokens are kept, and how one of them is drawn."""

    temperature: float = 1.0
    top_k: int = 0
    """So many likeliest ones, and those that are as likely as the last of them; 0 for all."""
    top_p: float = 1.0
    """The likeliest ones of what is left whose probabilities add up to this."""

    @classmethod
    def of(cls, config: GenerationConfig) -> Sampling | None:
        """The settings; None for greedy decoding."""
        return cls(config.temperature, config.top_k, config.top_p) if config.do_sample else None

    def draw(self, scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return a token for each row of scores [B, V]: by the next number of its generator, whatever other rows are.

        (Scores themselves may differ in the last bits between batch shapes, which can turn a draw on the very edge.)
        """
        drawn = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
        draws = drawn.to(scores.device)
        scores = scores / self.temperature
        if not self.top_k and self.top_p == 1:
            return _drawn(scores, draws)
        values, ids, is_sure = self._kept_of_candidates(scores)
        tokens = ids.gather(1, _drawn(values, draws)[:, None])[:, 0]
        unsure = (~is_sure).nonzero()[:, 0]
        if len(unsure):
            tokens[unsure] = _drawn(self._kept_of_all(scores[unsure]), draws[unsure])
        return tokens

    def _kept_of_candidates(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores of the candidates [B, C], -inf where they are not kept, their ids in rising order [B, C], and
        whether no other token of the row is kept [B]."""
        count = min(CANDIDATES, scores.shape[1])
        best, ids = scores.topk(count)
        edge = best[:, -1]
        ids = ids.sort(1).values
        values = scores.gather(1, ids)
        if self.top_k:
            if self.top_k > count:
                return values, ids, torch.zeros_like(edge, dtype=torch.bool)
            lowest = best[:, self.top_k - 1]
            values = values.masked_fill(values < lowest[:, None], -torch.inf)
            total = values.logsumexp(1)
        else:
            total = scores.logsumexp(1)
        if self.top_p < 1:
            # As TopPLogitsWarper: by rising probability, of equal ones the lower id first.
            rising, order = values.sort(dim=1, stable=True)
            probabilities = (rising - total[:, None]).double().exp()
            below = 1 - probabilities.sum(1, keepdim=True)
            is_removed = below + probabilities.cumsum(1) <= 1 - self.top_p
            is_removed[:, -1] = False
            values = values.masked_fill(is_removed.scatter(1, order, is_removed), -torch.inf)
        kept = values.masked_fill(values == -torch.inf, torch.inf).amin(1)
        return values, ids, (kept > edge) | (count == scores.shape[1])

    def _kept_of_all(self, scores: Tensor) -> Tensor:
        """Return scores [B, V], -inf where a token is not kept."""
        if self.top_k:
            scores = TopKLogitsWarper(self.top_k)(scores, scores)
        return TopPLogitsWarper(self.top_p)(scores, scores) if self.top_p < 1 else scores


def _drawn(scores: Tensor, draws: Tensor) -> Tensor:
    """Return the columns [B] that numbers between 0 and 1 [B, 1] draw from softmax(scores) [B, C]."""
    cumulative = scores.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)[:, 0]


def next_tokens(scores: Tensor, sampling: Sampling | None, generators: Sequence[torch.Generator]) -> Tensor:
    """Return the next token of each row [B] of fp32 scores [B, V]; the first of the likeliest without `sampling`."""
    return scores.max(-1).indices if sampling is None else sampling.draw(scores, generators)


def generator_of(seed: int) -> torch.Generator:
    """A row's random stream."""
    return torch.Generator().manual_seed(seed)


class SeededSampling(LogitsProcessor):
    """Draws each row's next token and leaves it as the only possible one: with it, greedy decoding samples."""

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self._generators = [generator_of(seed) for seed in seeds]
        self._sampling = sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take scores [B, V]; return them with all but one token at -inf."""
        drawn = self._sampling.draw(scores, self._generators)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)

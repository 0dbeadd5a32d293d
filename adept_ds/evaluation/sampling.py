"""The next token of each row: the likeliest, or drawn from the row's own random stream."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

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
        count = min(CANDIDATES, scores.shape[1])
        best, ids = scores.topk(count)
        ids = ids.sort(1).values
        values = self._kept(scores.gather(1, ids), best, scores)
        tokens = ids.gather(1, _drawn(values, draws)[:, None])[:, 0]
        # Whether more tokens would be kept is not known where the last candidate is kept, or one that is as likely.
        is_sure = values.masked_fill(values == -torch.inf, torch.inf).amin(1) > best[:, -1]
        unsure = (~is_sure).nonzero()[:, 0]
        if count < scores.shape[1] and len(unsure):
            rest = scores[unsure]
            tokens[unsure] = _drawn(self._kept(rest, rest.topk(max(1, self.top_k)).values, rest), draws[unsure])
        return tokens

    def _kept(self, values: Tensor, best: Tensor, scores: Tensor) -> Tensor:
        """Return the scores [B, C] of some tokens by rising ids, the likeliest among them, -inf where one is not kept.

        `best` are the likeliest by falling score, of all scores [B, V].
        """
        if self.top_k and self.top_k <= best.shape[1]:
            values = values.masked_fill(values < best[:, self.top_k - 1 : self.top_k], -torch.inf)
            total = values.logsumexp(1, keepdim=True)
        else:
            total = scores.logsumexp(1, keepdim=True)
        if self.top_p < 1:
            # As TopPLogitsWarper; but of equally likely tokens the lower id goes first, which there depends on how the
            # processor sorts.
            rising, order = values.sort(dim=1, stable=True)
            probabilities = (rising - total).double().exp()
            below = 1 - probabilities.sum(1, keepdim=True)
            is_removed = below + probabilities.cumsum(1) <= 1 - self.top_p
            is_removed[:, -1] = False
            values = values.masked_fill(is_removed.scatter(1, order, is_removed), -torch.inf)
        return values


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

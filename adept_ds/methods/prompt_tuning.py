"""Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691), alone and with the embedding matrix.

PT                  in = concat(P, E)
pt_embedding        in = concat(P, E + D[ids])      D [V, d], zero at the start
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from adept_ds.methods.prompted import PromptedMethod
from adept_ds.methods.soft_prompt import PromptedEmbedding


class PromptTuning(PromptedMethod):
    """The soft prompt alone: l d parameters; made from a `PromptTuningConfig`."""


class TokenOffset(nn.Module):
    """A free offset for every token: `weight` [V, d], zero at the start."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocabulary, width))

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the offsets of ids [...] in fp32 [..., d]."""
        return F.embedding(token_ids, self.weight).float()


class TokenOffsetEmbedding(PromptedEmbedding):
    """Input embedding whose matrix is tuned: an id v gives E[v] + D[v].

    D and not E is trained, so that the backbone stays as it is, and with it the other uses of a shared table.
    """

    def __init__(self, table: nn.Embedding, soft_prompt: nn.Module | None) -> None:
        super().__init__(table, soft_prompt)
        self.offset = TokenOffset(table.num_embeddings, table.embedding_dim)

    @override
    def add_offset(self, tokens: Tensor, token_ids: Tensor) -> Tensor:
        return tokens + self.offset(token_ids)


class PromptEmbedding(PromptedMethod):
    """Soft prompt and embedding matrix: l d + V d parameters; made from a `PromptEmbeddingConfig`."""

    @override
    def make_embedding(
        self, table: nn.Embedding, prompt: nn.Module | None, generator: torch.Generator | None
    ) -> TokenOffsetEmbedding:
        return TokenOffsetEmbedding(table, prompt)

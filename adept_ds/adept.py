"""ADePT itself (https://arxiv.org/abs/2501.03291, eq. 3 and 4): the soft prompt and the token-shared offset network.

With token embeddings E [B, S, d], prompt length l, bottleneck r and vocabulary size V:

    f(E) = ReLU(E W_down + b1) W_up + b2        W_down [d, r]   b1 [r]   W_up [r, d]   b2 [d]
    in   = concat(P, E + f(E))                  P [l, d]

The concatenation is done on token ids: prompt token i has the id V + i, and `AdeptEmbedding` returns P[i] for it. So
attention masks, positions, padding, beams and the KV cache are the backbone's stock code, and a generated token gets
its offset the same way a read one does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLED_VOCABULARY = 5_000
"""`prompt_init: tokens` draws among so many first ids, which are the frequent tokens of most vocabularies."""


class SoftPrompt(nn.Module):
    """The trained prompt P: `weight` [l, d]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, index: Tensor) -> Tensor:
        """Return P[index] in fp32: integer [...] to [..., d]."""
        return F.embedding(index, self.weight.float())


class TokenSharedNetwork(nn.Module):
    """The offset f(E) = ReLU(E W_down + b1) W_up + b2, the same function for every token.

    W_up, b1 and b2 start at zero, so the offset is exactly zero at step 0. `down_bound` b gives W_down ~ U(-b, b).
    Parameters: 2 r d + r + d.
    """

    def __init__(
        self, width: int, bottleneck: int, down_bound: float, dropout: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.w_down = nn.Parameter(
            torch.empty(width, bottleneck).uniform_(-down_bound, down_bound, generator=generator)
        )
        self.b1 = nn.Parameter(torch.zeros(bottleneck))
        self.w_up = nn.Parameter(torch.zeros(bottleneck, width))
        self.b2 = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the offsets of fp32 embeddings [..., d], in fp32 whatever the parameters are stored in."""
        hidden = F.relu(embeddings @ self.w_down.float() + self.b1.float())
        return self.dropout(hidden) @ self.w_up.float() + self.b2.float()


def down_projection_bound(rule: str, width: int, bottleneck: int) -> float:
    """Bound of W_down's uniform initialisation by the name used in the settings.

    `published`: Kaiming-uniform with a = sqrt(5) on a [d, r] matrix takes r as the fan-in, which gives 1/sqrt(r).
    `linear`: the rule of a linear layer from d to r units, 1/sqrt(d).
    """
    return 1 / math.sqrt({"published": bottleneck, "linear": width}[rule])


class AdeptEmbedding(nn.Module):
    """Input embedding with ADePT: ids [B, S] to [B, S, d] in the dtype of the frozen table.

    An id v below V gives E[v] + f(E[v]), an id V + i gives P[i]. The sum is computed in fp32 and cast once: in bf16
    arithmetic throughout, two of five elements would come out differently.

    All three submodules are called for every input, whether it has prompt ids or not: under ZeRO-3 each call gathers
    parameters from all ranks, so all ranks must make the same calls.
    """

    def __init__(self, table: nn.Embedding, soft_prompt: SoftPrompt | None, network: TokenSharedNetwork) -> None:
        super().__init__()
        self.table = table
        self.soft_prompt = soft_prompt
        self.network = network
        self.num_embeddings = table.num_embeddings
        self.embedding_dim = table.embedding_dim
        self.enabled = True

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed ids in [0, V + l)."""
        if not self.enabled:
            return self.table(input_ids)
        is_prompt = input_ids >= self.num_embeddings
        tokens = self.table(input_ids.masked_fill(is_prompt, 0))
        embeddings = self._add_offset(tokens)
        if self.soft_prompt is not None:
            prompt = self.soft_prompt((input_ids - self.num_embeddings).clamp(min=0))
            embeddings = torch.where(is_prompt.unsqueeze(-1), prompt, embeddings)
        return embeddings.to(tokens.dtype)

    def _add_offset(self, tokens: Tensor) -> Tensor:
        tokens = tokens.float()
        return tokens + self.network(tokens)

    @torch.no_grad()
    def folded_weight(self, rows: int = 8_192) -> Tensor:
        """Return the table E + f(E) [V, d] in the table's dtype, computed `rows` rows at a time.

        The offset depends on the token alone, so with this table as the embedding a tuned model costs what the
        backbone costs with l more tokens. The table must not be sharded.
        """
        weight = self.table.weight
        return torch.cat([self._add_offset(part).to(weight.dtype) for part in weight.split(rows)])

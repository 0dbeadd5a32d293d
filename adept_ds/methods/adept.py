"""ADePT itself (https://arxiv.org/abs/2501.03291, eq. 3 and 4): the token-shared offset network beside a soft prompt.

With token embeddings E [B, S, d], prompt length l, bottleneck r and vocabulary size V:

    f(E) = ReLU(E W_down + b1) W_up + b2        W_down [d, r]   b1 [r]   W_up [r, d]   b2 [d]
    in   = concat(P, E + f(E))                  P [l, d]

The concatenation is done on token ids, see `adept_ds.methods.soft_prompt`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from adept_ds.config.method import AdeptConfig
from adept_ds.methods.prompted import PromptedMethod
from adept_ds.methods.soft_prompt import PromptedEmbedding


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

    def hidden(self, embeddings: Tensor) -> Tensor:
        """Return ReLU(E W_down + b1) [..., r] of fp32 embeddings [..., d]."""
        return F.relu(embeddings @ self.w_down.float() + self.b1.float())

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the offsets of fp32 embeddings [..., d], in fp32 whatever the parameters are stored in."""
        return self.dropout(self.hidden(embeddings)) @ self.w_up.float() + self.b2.float()


def down_projection_bound(rule: str, width: int, bottleneck: int) -> float:
    """Bound of W_down's uniform initialisation by the name used in the settings.

    `published`: Kaiming-uniform with a = sqrt(5) on a [d, r] matrix takes r as the fan-in, which gives 1/sqrt(r).
    `linear`: the rule of a linear layer from d to r units, 1/sqrt(d).
    """
    return 1 / math.sqrt({"published": bottleneck, "linear": width}[rule])


class AdeptEmbedding(PromptedEmbedding):
    """Input embedding with ADePT: an id v below V gives E[v] + f(E[v]), an id V + i gives P[i]."""

    def __init__(
        self,
        table: nn.Embedding,
        soft_prompt: nn.Module | None,
        network: TokenSharedNetwork,
        offset_in_evaluation: bool = True,
    ) -> None:
        super().__init__(table, soft_prompt, offset_in_evaluation)
        self.network = network

    @override
    def add_offset(self, tokens: Tensor, token_ids: Tensor) -> Tensor:
        return tokens + self.network(tokens)

    @torch.no_grad()
    def folded_weight(self, rows: int = 8_192) -> Tensor:
        """Return what this embedding gives for each token of the vocabulary [V, d], computed `rows` rows at a time.

        The offset depends on the token alone, so with these rows as the embedding a tuned model costs what the backbone
        costs with l more tokens. The table must not be sharded. A whole model is written by `adept_ds.export`.
        """
        ids = torch.arange(self.num_embeddings, device=self.weight.device)
        return torch.cat([self(part) for part in ids.split(rows)])


class Adept(PromptedMethod):
    """Soft prompt and token-shared offset network in the input embedding; made from an `AdeptConfig`."""

    config: AdeptConfig

    @override
    def make_embedding(
        self, table: nn.Embedding, prompt: nn.Module | None, generator: torch.Generator | None
    ) -> AdeptEmbedding:
        config = self.config
        network = TokenSharedNetwork(
            table.embedding_dim,
            config.bottleneck,
            down_projection_bound(config.down_init, table.embedding_dim, config.bottleneck),
            config.dropout,
            generator,
        )
        return AdeptEmbedding(table, prompt, network, config.offset_in_evaluation)

"""ADePT as a method: see `adept_ds.adept` for the mathematics."""

from __future__ import annotations

import torch
from torch import nn

from adept_ds.adept import AdeptEmbedding, TokenSharedNetwork, down_projection_bound
from adept_ds.methods.prompted import PromptedMethod


class Adept(PromptedMethod):
    """Soft prompt and token-shared offset network in the input embedding; made from an `AdeptConfig`."""

    def make_embedding(
        self, table: nn.Embedding, prompt: nn.Module | None, generator: torch.Generator | None
    ) -> AdeptEmbedding:
        """See `PromptedMethod.make_embedding`."""
        config = self.config
        network = TokenSharedNetwork(
            table.embedding_dim,
            config.bottleneck,
            down_projection_bound(config.down_init, table.embedding_dim, config.bottleneck),
            config.dropout,
            generator,
        )
        return AdeptEmbedding(table, prompt, network, config.offset_in_evaluation)

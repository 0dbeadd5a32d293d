"""DePT (Shi and Lipani 2024, https://arxiv.org/abs/2309.05173; eq. 2 of the ADePT paper).

    in = concat(P, E + 8 / sqrt(r) A B)      P [l, d]   A [S, r]   B [r, d]

Row i of A B is added to the i-th token behind the prompt, counted from 0; padding is not counted. The published code
counts columns, which comes to the same, since it pads on the right. Tokens from position S on have no offset.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.config.method import DeptConfig
from adept_ds.methods.prompted import PromptedMethod
from adept_ds.methods.soft_prompt import PromptedEmbedding

SCALE = 8
"""Numerator of the factor before A B."""


class PositionOffset(nn.Module):
    """The offsets 8 / sqrt(r) A B: `a` [S, r] ~ U(-1/sqrt(r), 1/sqrt(r)), `b` [r, d] zero at the start.

    Parameters: r (S + d).
    """

    def __init__(
        self, max_positions: int, rank: int, width: int, cyclic_shift: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(rank)  # Kaiming-uniform with a = sqrt(5), which takes r as the fan-in of [S, r].
        self.a = nn.Parameter(torch.empty(max_positions, rank).uniform_(-bound, bound, generator=generator))
        self.b = nn.Parameter(torch.zeros(rank, width))
        self.max_positions = max_positions
        self.cyclic_shift = cyclic_shift
        self.scale = SCALE / math.sqrt(rank)

    def forward(self, positions: Tensor) -> Tensor:
        """Return the fp32 offsets [..., d] of positions [...]; zero outside of [0, S)."""
        rows = (positions + self.cyclic_shift) % self.max_positions
        offsets = self.scale * (F.embedding(rows, self.a.float()) @ self.b.float())
        has_offset = (positions >= 0) & (positions < self.max_positions)
        return offsets * has_offset.unsqueeze(-1)


class DeptEmbedding(PromptedEmbedding):
    """Input embedding with DePT. `positions` [B or 1, S] must be set before each call."""

    positions: Tensor

    def __init__(
        self, table: nn.Embedding, soft_prompt: nn.Module | None, offset: PositionOffset, offset_in_evaluation: bool
    ) -> None:
        super().__init__(table, soft_prompt, offset_in_evaluation)
        self.offset = offset

    @override
    def add_offset(self, tokens: Tensor, token_ids: Tensor) -> Tensor:
        return tokens + self.offset(self.positions)


class Dept(PromptedMethod):
    """Soft prompt and positional offsets in the input embedding; made from a `DeptConfig`."""

    config: DeptConfig
    embedding: DeptEmbedding

    @override
    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        super().inject(backbone, tokenizer, generator)
        reader = backbone.get_encoder() if backbone.config.is_encoder_decoder else backbone
        reader.register_forward_pre_hook(self._note_positions, with_kwargs=True)

    @override
    def make_embedding(
        self, table: nn.Embedding, prompt: nn.Module | None, generator: torch.Generator | None
    ) -> DeptEmbedding:
        config = self.config
        offset = PositionOffset(config.max_positions, config.rank, table.embedding_dim, config.cyclic_shift, generator)
        return DeptEmbedding(table, prompt, offset, config.offset_in_evaluation)

    def _note_positions(self, reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the embedding where the tokens of this call stand: an id alone does not say it."""
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if positions is None:
            ids, cache = args[0] if args else kwargs["input_ids"], kwargs.get("past_key_values")
            read = cache.get_seq_length() if cache is not None else 0
            if mask is None:  # as `generate` has it for rows without padding, where the architecture allows
                mask = ids.new_ones(ids.shape[0], read + ids.shape[1])
            # The mask covers what is in the cache too.
            positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        self.embedding.positions = positions - self.num_virtual_tokens

"""The soft prompt, and the input embedding that reads it: only torch.

Prompt token i has the id V + i, where V is the vocabulary size, and the embedding returns P[i] for it. To the backbone
it is a token like any other, so attention masks, positions, padding, beams and the KV cache need no code here; and an
offset is added to generated tokens just as to those that were read. Where there are several prompts of l tokens,
token i of prompt k has the id V + k l + i, so that a row's ids say which prompt it reads.
"""

from __future__ import annotations

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


class PromptedEmbedding(nn.Module):
    """Input embedding with a soft prompt: ids [B, S] to [B, S, d] in the dtype of the frozen table.

    An id v below V gives E[v] + offset, an id V + i gives P[i]. The sum is computed in fp32 and cast once: in bf16
    arithmetic throughout, two of five elements would come out differently.

    All submodules are called for every input, whether it has prompt ids or not: under ZeRO-3 each call gathers
    parameters from all ranks, so all ranks must make the same calls.

    Args:
        table: The backbone's embedding.
        soft_prompt: Module that returns P[index] [..., d] in fp32 for an index [...]; None for no prompt.
        offset_in_evaluation: False leaves the offset out in evaluation mode.
    """

    def __init__(self, table: nn.Embedding, soft_prompt: nn.Module | None, offset_in_evaluation: bool = True) -> None:
        super().__init__()
        self.table = table
        self.soft_prompt = soft_prompt
        self.num_embeddings = table.num_embeddings
        self.embedding_dim = table.embedding_dim
        self.offset_in_evaluation = offset_in_evaluation
        self.enabled = True

    @property
    def weight(self) -> Tensor:
        """The table's, which some backbones ask for its type or place."""
        return self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed ids below V, and prompt ids from V on."""
        if not self.enabled:
            return self.table(input_ids)
        is_prompt = input_ids >= self.num_embeddings
        token_ids = input_ids.masked_fill(is_prompt, 0)
        tokens = self.table(token_ids)
        embeddings = tokens.float()
        if self.training or self.offset_in_evaluation:
            embeddings = self.add_offset(embeddings, token_ids)
        if self.soft_prompt is not None:
            prompt = self.read_prompt((input_ids - self.num_embeddings).clamp(min=0), tokens)
            embeddings = torch.where(is_prompt.unsqueeze(-1), prompt, embeddings)
        return embeddings.to(tokens.dtype)

    def read_prompt(self, index: Tensor, tokens: Tensor) -> Tensor:
        """Return the fp32 prompt vectors [B, S, d] of the index [B, S], of which those in a token's place are not used;
        `tokens` [B, S, d] are the table's rows. Here the prompt is the same for all rows."""
        assert self.soft_prompt is not None
        prompt: Tensor = self.soft_prompt(index)
        return prompt

    def add_offset(self, tokens: Tensor, token_ids: Tensor) -> Tensor:
        """Return fp32 token embeddings [B, S, d] of the ids [B, S] with their offsets; here there are none."""
        return tokens


def inserted(rows: Tensor, values: Tensor, first: Tensor) -> Tensor:
    """Put values [B or 1, l] in front of column `first` [B, 1] of each row [B, S]; return [B, l + S]."""
    (count, columns), length = rows.shape, values.shape[1]
    if length == 0:
        return rows
    position = torch.arange(length + columns, device=rows.device).expand(count, -1)
    inside = (position >= first) & (position < first + length)
    source = torch.where(position < first, position, position - length).clamp(min=0)
    placed = values.expand(count, -1).gather(1, (position - first).clamp(0, length - 1))
    return torch.where(inside, placed, rows.gather(1, source))

"""Soft prompts that are made of other parameters.

DPT (Xiao et al. 2023, https://arxiv.org/abs/2310.10094)
    P = A B                                             A [l, r]   B [r, d]
Residual prompt tuning (Razdaibiedina et al. 2023, https://arxiv.org/abs/2305.03937)
    P' = P + LayerNorm(ReLU(P W_down + b1) W_up + b2)   P [l, d]   W_down [d, r]   W_up [r, d]

Both are read as in = concat(P, E), and both are trained at the rate of soft prompts, 0.3 in their papers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.backbone.sharding import gathered
from adept_ds.config.method import DptConfig, ResidualPromptConfig
from adept_ds.methods.prompted import PromptedMethod, initial_prompt

DPT_BOUND = 0.5
"""Bound of the uniform draws that A and B start at, as in the published code."""


class LowRankPrompt(nn.Module):
    """P = A B: `a` [l, r], `b` [r, d]."""

    def __init__(self, length: int, rank: int, width: int, generator: torch.Generator | None) -> None:
        super().__init__()
        bounds = (-DPT_BOUND, DPT_BOUND)
        self.a = nn.Parameter(torch.empty(length, rank).uniform_(*bounds, generator=generator))
        self.b = nn.Parameter(torch.empty(rank, width).uniform_(*bounds, generator=generator))

    def forward(self, index: Tensor) -> Tensor:
        """Return P[index] in fp32: integer [...] to [..., d]."""
        return F.embedding(index, self.a.float() @ self.b.float())


class DecomposedPromptTuning(PromptedMethod):
    """DPT: r (l + d) parameters, 8,680 for T5-base at l = 100 and r = 10; made from a `DptConfig`."""

    config: DptConfig

    @override
    def make_prompt(
        self, table: nn.Embedding, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> LowRankPrompt:
        return LowRankPrompt(self.config.num_virtual_tokens, self.config.rank, table.embedding_dim, generator)


class ResidualPrompt(nn.Module):
    """P' = P + LayerNorm(ReLU(P W_down + b1) W_up + b2), the network shared by the prompt's tokens.

    Parameters: l d + 2 r d + r + 3 d. The network starts as torch draws linear layers, as published, where W_down, b1
    are bound by 1 / sqrt(d), and W_up, b2 by 1 / sqrt(r).
    """

    def __init__(self, prompt: Tensor, bottleneck: int, generator: torch.Generator | None) -> None:
        super().__init__()
        width = prompt.shape[1]

        def drawn(*shape: int, inputs: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator))

        self.weight = nn.Parameter(prompt)
        self.w_down, self.b1 = drawn(width, bottleneck, inputs=width), drawn(bottleneck, inputs=width)
        self.w_up, self.b2 = drawn(bottleneck, width, inputs=bottleneck), drawn(width, inputs=bottleneck)
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))

    def forward(self, index: Tensor) -> Tensor:
        """Return P'[index] in fp32: integer [...] to [..., d]."""
        prompt = self.weight.float()
        hidden = F.relu(prompt @ self.w_down.float() + self.b1.float())
        added = hidden @ self.w_up.float() + self.b2.float()
        added = F.layer_norm(added, added.shape[-1:], self.norm_weight.float(), self.norm_bias.float())
        return F.embedding(index, prompt + added)


class ResidualPromptTuning(PromptedMethod):
    """Residual prompt tuning, 693,904 parameters for T5-base at l = 100 and r = 400; made from a
    `ResidualPromptConfig`."""

    config: ResidualPromptConfig

    @override
    def make_prompt(
        self, table: nn.Embedding, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> ResidualPrompt:
        with gathered([table.weight]):
            prompt = initial_prompt(self.config, table, tokenizer, generator)
        return ResidualPrompt(prompt, self.config.bottleneck, generator)

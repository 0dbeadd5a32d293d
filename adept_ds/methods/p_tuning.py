"""P-tuning (Liu et al. 2021, https://arxiv.org/abs/2103.10385) with HF PEFT's prompt encoder.

in = concat(g(Q), E)      Q [l, d]      g: an MLP, or a bidirectional LSTM and an MLP
"""

from __future__ import annotations

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.config.method import PTuningConfig
from adept_ds.methods.layers import seeded
from adept_ds.methods.prompted import PromptedMethod


class EncodedPrompt(nn.Module):
    """The soft prompt that an encoder makes of its own l embeddings."""

    def __init__(self, encoder: peft.PromptEncoder, length: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.length = length

    def forward(self, index: Tensor) -> Tensor:
        """Return P[index] in fp32: integer [...] to [..., d]."""
        prompt = self.encoder(torch.arange(self.length, device=index.device)[None])
        return F.embedding(index, prompt[0].float())


class PTuning(PromptedMethod):
    """Soft prompt from an encoder in the input embedding; made from a `PTuningConfig`."""

    config: PTuningConfig

    @override
    def make_prompt(
        self, table: nn.Embedding, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> EncodedPrompt:
        config = self.config
        settings = peft.PromptEncoderConfig(
            encoder_reparameterization_type=config.reparameterization.upper(),
            encoder_hidden_size=config.hidden_size or table.embedding_dim,
            num_virtual_tokens=config.num_virtual_tokens,
            num_transformer_submodules=1,
            token_dim=table.embedding_dim,
        )
        with seeded(generator):
            return EncodedPrompt(peft.PromptEncoder(settings), config.num_virtual_tokens)

"""ADePT as a method: placement in a backbone, initialisation, parameter names."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adept_ds.adept import SAMPLED_VOCABULARY, AdeptEmbedding, SoftPrompt, TokenSharedNetwork, down_projection_bound
from adept_ds.errors import UserError
from adept_ds.method_config import AdeptConfig
from adept_ds.methods.base import attribute_set
from adept_ds.sharding import gathered


class Adept:
    """Replaces the input embedding of a causal model, or of an encoder-decoder's encoder alone.

    T5 shares one table between encoder, decoder and LM head; the other two keep the plain one.
    """

    def __init__(self, config: AdeptConfig) -> None:
        self.config = config
        self.num_virtual_tokens = config.num_virtual_tokens

    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        """See `Method.inject`."""
        config = self.config
        reader = backbone.get_encoder() if backbone.config.is_encoder_decoder else backbone
        table = cast(nn.Embedding, reader.get_input_embeddings())
        soft_prompt = None
        if config.num_virtual_tokens:
            with gathered([table.weight]):
                soft_prompt = SoftPrompt(self._initial_prompt(table, tokenizer, generator))
        network = TokenSharedNetwork(
            table.embedding_dim,
            config.bottleneck,
            down_projection_bound(config.down_init, table.embedding_dim, config.bottleneck),
            config.dropout,
            generator,
        )
        self.embedding = AdeptEmbedding(table, soft_prompt, network)
        for module in (soft_prompt, network):
            if module is not None:
                module.to(table.weight.device)
        reader.set_input_embeddings(self.embedding)

    def _initial_prompt(
        self, table: nn.Embedding, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> Tensor:
        """Return the fp32 start of P [l, d] on the CPU."""
        config, weight = self.config, table.weight.detach()
        length, width = config.num_virtual_tokens, table.embedding_dim
        if weight.is_meta or generator is None:
            return torch.zeros(length, width)
        if config.prompt_init == "normal":
            std = config.prompt_init_std or float(weight.float().std())
            return torch.randn(length, width, generator=generator) * std
        if config.prompt_init == "text":
            ids = self._text_ids(tokenizer)
        else:
            ids = torch.randint(min(SAMPLED_VOCABULARY, table.num_embeddings), (length,), generator=generator)
        return F.embedding(ids.to(weight.device), weight).float().cpu()

    def _text_ids(self, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
        """Return the token ids of `prompt_init_text`, repeated or cut to l [l]."""
        if tokenizer is None:
            raise UserError("method.prompt_init is 'text', which needs the backbone's tokenizer")
        ids = tokenizer(self.config.prompt_init_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"method.prompt_init_text is {self.config.prompt_init_text!r}, which has no token")
        length = self.config.num_virtual_tokens
        return torch.tensor((ids * -(-length // len(ids)))[:length])

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """See `Method.trained_parameters`."""
        prompt = self.embedding.soft_prompt
        network = {f"network.{name}": parameter for name, parameter in self.embedding.network.named_parameters()}
        return network if prompt is None else {"soft_prompt": prompt.weight, **network}

    def learning_rate_group(self, name: str) -> str:
        """See `Method.learning_rate_group`."""
        return name.partition(".")[0]

    def disabled(self) -> AbstractContextManager[None]:
        """See `Method.disabled`."""
        return attribute_set(self.embedding, "enabled", False)

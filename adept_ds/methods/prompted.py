"""What the methods that work on the input embedding share: placement, the soft prompt, parameter names."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.backbone.sharding import gathered
from adept_ds.config.method import PromptSettings
from adept_ds.contexts import attribute_set
from adept_ds.errors import UserError
from adept_ds.methods.base import MethodDefaults
from adept_ds.methods.soft_prompt import SAMPLED_VOCABULARY, PromptedEmbedding, SoftPrompt


class PromptedMethod(MethodDefaults):
    """Replaces the input embedding of a causal model, or of an encoder-decoder's encoder alone.

    T5 shares one table between encoder, decoder and LM head; the other two keep the plain one.
    """

    config: Any
    embedding: PromptedEmbedding

    @override
    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        reader = backbone.get_encoder() if backbone.config.is_encoder_decoder else backbone
        table = cast(nn.Embedding, reader.get_input_embeddings())
        prompt = self.make_prompt(table, tokenizer, generator) if self.num_virtual_tokens else None
        self.embedding = self.make_embedding(table, prompt, generator)
        for name, module in self.embedding.named_children():
            if name != "table":
                module.to(table.weight.device)
        reader.set_input_embeddings(self.embedding)

    def make_prompt(
        self, table: nn.Embedding, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> nn.Module:
        """Return the module that gives the prompt's vectors, on the CPU; here free vectors."""
        with gathered([table.weight]):
            return SoftPrompt(initial_prompt(self.config, table, tokenizer, generator))

    def make_embedding(
        self, table: nn.Embedding, prompt: nn.Module | None, generator: torch.Generator | None
    ) -> PromptedEmbedding:
        """Return the embedding that takes the table's place, what it adds on the CPU; here the prompt alone."""
        return PromptedEmbedding(table, prompt)

    @override
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {
            "soft_prompt" if name == "soft_prompt.weight" else name: parameter
            for name, parameter in self.embedding.named_parameters()
            if not name.startswith("table.")
        }

    @override
    def learning_rate_group(self, name: str) -> str:
        return "soft_prompt" if name.partition(".")[0] == "soft_prompt" else "network"

    @override
    def disabled(self) -> AbstractContextManager[None]:
        return attribute_set(self.embedding, "enabled", False)


def initial_prompt(
    config: PromptSettings,
    table: nn.Embedding,
    tokenizer: PreTrainedTokenizerBase | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the fp32 start of P [l, d] on the CPU, of what the table's layer returns; the table must be whole.

    That is not the weight where the layer scales its rows, as Gemma's does by sqrt(d).

    Raises:
        UserError: `prompt_init: text` without a tokenizer, or with a text that has no token.
    """
    weight = table.weight.detach()
    length, width = config.num_virtual_tokens, table.embedding_dim
    if weight.is_meta or generator is None:
        return torch.zeros(length, width)
    if config.prompt_init == "normal":
        std = config.prompt_init_std or float(table(torch.arange(table.num_embeddings).to(weight.device)).float().std())
        return torch.randn(length, width, generator=generator) * std
    if config.prompt_init == "text":
        ids = _text_ids(config, tokenizer)
    else:
        ids = torch.randint(min(SAMPLED_VOCABULARY, table.num_embeddings), (length,), generator=generator)
    return table(ids.to(weight.device)).detach().float().cpu()


def _text_ids(config: PromptSettings, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """Return the token ids of `prompt_init_text`, repeated or cut to l [l]."""
    if tokenizer is None:
        raise UserError("method.prompt_init is 'text', which needs the backbone's tokenizer")
    ids = tokenizer(config.prompt_init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"method.prompt_init_text is {config.prompt_init_text!r}, which has no token")
    length = config.num_virtual_tokens
    return torch.tensor((ids * -(-length // len(ids)))[:length])

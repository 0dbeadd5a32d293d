"""ATTEMPT, attentional mixtures of soft prompts (Asai et al. 2022, https://arxiv.org/abs/2205.11961).

    h  = LayerNorm(SiLU(x W_down) W_up)       x [d]: the largest of the input's embeddings in each dimension
    a  = softmax_j(p_j h / T)                 p_j [d]: the same of prompt P_j [l, d]
    P' = P + sum_j a_j P_j                    j: the n frozen source prompts, and P itself
    in = concat(P', E)

Every row has weights a of its own, and so a prompt of its own. Where several tasks are trained together, each has a
target prompt P of its own, and they share the network. The input x is what is read before anything is
predicted: all that an encoder reads, and in a causal model the tokens in front of the answer, in training as in
generation. Padding is no part of it; the published code counts it in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.backbone.sharding import gathered
from adept_ds.config.method import AttemptConfig
from adept_ds.methods.base import BatchValue, for_rows
from adept_ds.methods.layers import embedding_table
from adept_ds.methods.prompted import PromptedMethod, initial_prompt
from adept_ds.methods.soft_prompt import PromptedEmbedding, SoftPrompt
from adept_ds.methods.source_prompts import load_source_prompts
from adept_ds.methods.source_tasks import for_own_tasks
from adept_ds.storage.adapter_folder import Adapter, backbone_facts

INIT_STD = 0.01
"""Standard deviation of the draws that W_down and W_up start at, as in the published code."""


class AttentionNetwork(nn.Module):
    """The query h = LayerNorm(SiLU(x W_down) W_up): `w_down` [d, r], `w_up` [r, d], and the norm's weight and bias [d].

    Parameters: 2 r d + 2 d.
    """

    def __init__(self, width: int, bottleneck: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.w_down = nn.Parameter(torch.empty(width, bottleneck).normal_(0, INIT_STD, generator=generator))
        self.w_up = nn.Parameter(torch.empty(bottleneck, width).normal_(0, INIT_STD, generator=generator))
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the queries of fp32 inputs [B, d], in fp32 whatever the parameters are stored in."""
        hidden = F.silu(inputs @ self.w_down.float()) @ self.w_up.float()
        return F.layer_norm(hidden, hidden.shape[-1:], self.norm_weight.float(), self.norm_bias.float())


@dataclass(frozen=True)
class RowInputs:
    """What the prompts of a batch's rows are made of."""

    context: Tensor
    """Which columns of a row are its input [B, l + S]."""
    example_ids: Tensor | None
    """In packed rows, the number of each column's example, from 1 on [B, l + S]."""


class AttemptEmbedding(PromptedEmbedding):
    """Input embedding whose prompt depends on the row. `batch` must have a value when a row with a prompt is read."""

    sources: Tensor

    def __init__(
        self,
        table: nn.Embedding,
        soft_prompt: SoftPrompt,
        sources: Tensor,
        network: AttentionNetwork,
        temperature: float,
        batch: BatchValue[RowInputs],
    ) -> None:
        super().__init__(table, soft_prompt)
        self.batch = batch
        self.register_buffer("sources", sources, persistent=False)
        self.network = network
        self.temperature = temperature

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed ids below V, and prompt ids from V on.

        Raises:
            ValueError: There is a prompt to read, but not the whole of the input that it depends on.
        """
        # Without a cache, what has been generated is read again behind the input.
        context = self.batch.value.context if self.batch.value else None
        is_whole = context is not None and context.shape[1] <= input_ids.shape[1]
        if self.enabled and not is_whole and bool((input_ids >= self.num_embeddings).any()):
            raise ValueError(
                "the prompt of ATTEMPT depends on the whole input, and a part of it came alone; generate without "
                "prefill_chunk_size"
            )
        return super().forward(input_ids)

    @override
    def read_prompt(self, index: Tensor, tokens: Tensor) -> Tensor:
        assert self.soft_prompt is not None
        (rows, columns), length = index.shape, self.sources.shape[1]
        sources, read = self.sources.float(), self.batch.value
        examples, owner = 1, index.new_zeros(rows, columns)
        if read is not None and read.example_ids is not None:
            examples, owner = columns // (length + 1), (read.example_ids - 1).clamp(min=0)
        owner = owner + examples * torch.arange(rows, device=index.device)[:, None]
        # The prompt's tokens say which task's they are; among other tokens the index is 0.
        highest = index.new_zeros(rows * examples).scatter_reduce(0, owner.flatten(), index.flatten(), "amax")
        first = length * (highest // length)
        own: Tensor = self.soft_prompt(first[:, None] + torch.arange(length, device=index.device))
        largest = _largest(tokens, self._input_columns(rows, columns, index.device), owner, rows * examples)
        queries = self.network(largest.float())
        scores = torch.cat([queries @ sources.amax(1).T, (queries * own.amax(1)).sum(-1, keepdim=True)], 1)
        weights = (scores / self.temperature).softmax(-1)
        mixtures = (1 + weights[:, -1, None, None]) * own + torch.einsum("bn,nld->bld", weights[:, :-1], sources)
        return F.embedding(index % length + length * owner, mixtures.flatten(0, 1))

    def _input_columns(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Which columns are a row's input [B, S]. A call for generated tokens alone has no prompt, and none are."""
        context = self.batch.value.context if self.batch.value else None
        if context is None or context.shape[1] > columns:
            return torch.zeros(rows, columns, dtype=torch.bool, device=device)
        return for_rows(F.pad(context, (0, columns - context.shape[1])), rows)


def _largest(vectors: Tensor, is_counted: Tensor, owner: Tensor, owners: int) -> Tensor:
    """Return the largest of each owner's vectors in each dimension [O, d], of vectors [B, S, d] that count and whose
    owner has a number [B, S]; zeros where none does."""
    counted = vectors.masked_fill(~is_counted[..., None], -torch.inf).flatten(0, 1)
    lowest = vectors.new_full((owners, vectors.shape[-1]), -torch.inf)
    largest = lowest.scatter_reduce(0, owner.flatten()[:, None].expand_as(counted), counted, "amax")
    return largest.masked_fill(largest == -torch.inf, 0)


class Attempt(PromptedMethod):
    """Target prompts of T tasks and attention over source prompts: T l d + 2 r d + 2 d parameters; made from an
    `AttemptConfig`.

    For T5-base at l = r = 100, 231,936 for one task, and for eight 769,536, which are 96,192 for each. The source
    prompts are in the adapter file too, which needs no other.
    """

    config: AttemptConfig
    embedding: AttemptEmbedding
    prompt_is_shared = False

    def __init__(self, config: AttemptConfig) -> None:
        super().__init__(config)
        self.batch: BatchValue[RowInputs] = BatchValue()

    @override
    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        """Read the source prompts too, where values are initialised: an adapter file has them.

        Raises:
            UserError: As `load_source_prompts`.
        """
        config, table = self.config, embedding_table(backbone)
        if table.weight.is_meta or generator is None:
            self._sources = torch.zeros(len(config.sources), config.num_virtual_tokens, table.embedding_dim)
        else:
            length, facts = config.num_virtual_tokens, backbone_facts(backbone)
            self._sources = load_source_prompts(config.source_prompts, length, facts)
        super().inject(backbone, tokenizer, generator)

    @override
    def make_prompt(
        self, table: nn.Embedding, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> SoftPrompt:
        """All tasks' prompts [T l, d], one after another; they start alike."""
        if self.config.prompt_init == "source":
            start = self._sources[0]
        else:
            with gathered([table.weight]):
                start = initial_prompt(self.config, table, tokenizer, generator)
        return SoftPrompt(start.repeat(max(1, len(self.config.tasks)), 1))

    @override
    def make_embedding(
        self, table: nn.Embedding, prompt: nn.Module | None, generator: torch.Generator | None
    ) -> AttemptEmbedding:
        network = AttentionNetwork(table.embedding_dim, self.config.bottleneck, generator)
        temperature = self.config.temperature or math.e * table.embedding_dim
        sources = self._sources.to(table.weight.device)
        return AttemptEmbedding(table, cast(SoftPrompt, prompt), sources, network, temperature, self.batch)

    @override
    def constants(self) -> dict[str, Tensor]:
        return {"sources": self.embedding.sources}

    @override
    def start_values(self, source: Adapter) -> dict[str, Tensor]:
        """The source prompts stay those of the settings.

        Raises:
            UserError: As `for_own_tasks`.
        """
        prompts = source.tensors["soft_prompt"].unflatten(0, (-1, self.config.num_virtual_tokens))
        prompts = for_own_tasks(prompts, source, self.config).flatten(0, 1)
        return source.tensors | self.constants() | {"soft_prompt": prompts}

    @override
    def for_batch(self, context: Tensor, task_ids: Tensor, example_ids: Tensor | None = None) -> RowInputs:
        return RowInputs(context, example_ids)

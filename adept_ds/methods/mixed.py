"""Many adapters on one backbone, another one (or none) for each row of a batch.

They are the adapters whose vectors depend on the token alone: ADePT's, and those that are a soft prompt. With k(b) the
adapter of row b, all have one embedding,

    E[v] + ReLU(E[v] W_down[k] + b1[k]) W_up[k] + b2[k]   for a token v        P[k, i]   for prompt token i

with the weights of all stacked, narrow bottlenecks and short prompts filled up with zeros: one gather and two batched
products, whatever the number of adapters. Adapter 0 is none: zeros, and no prompt. Prompts stand at the right end of
their L places; the mask leaves out the places in front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.config.method import (
    AdeptConfig,
    DptConfig,
    MethodConfig,
    MptConfig,
    PromptTuningConfig,
    PTuningConfig,
    ResidualPromptConfig,
)
from adept_ds.contexts import attribute_set
from adept_ds.errors import UserError, did_you_mean
from adept_ds.methods.adept import AdeptEmbedding
from adept_ds.methods.base import BatchValue, Method, MethodDefaults, for_rows, load_values
from adept_ds.methods.prompted import PromptedMethod
from adept_ds.methods.soft_prompt import PromptedEmbedding
from adept_ds.storage.adapter_folder import Adapter

BY_TOKEN = AdeptConfig | PromptTuningConfig | PTuningConfig | DptConfig | ResidualPromptConfig | MptConfig
"""Methods whose vectors depend on the token alone."""


@dataclass(frozen=True)
class Vectors:
    """What one adapter's embedding is made of, in fp32."""

    prompt: Tensor
    """[l, d]."""
    w_down: Tensor
    """[d, r]; r is 0 for a soft prompt alone."""
    b1: Tensor
    """[r]."""
    w_up: Tensor
    """[r, d]."""
    b2: Tensor
    """[d]."""


class StackedPrompts(nn.Module):
    """The prompts of n adapters, one after another: `weight` [n L, d]."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """Return prompt vectors in fp32: integer [...] to [..., d], where token i of adapter k is k L + i."""
        return F.embedding(index, self.weight)


class MixedEmbedding(PromptedEmbedding):
    """Input embedding of several adapters. The value of `batch` [B] says which one reads each row."""

    w_down: Tensor
    b1: Tensor
    w_up: Tensor
    b2: Tensor

    def __init__(self, table: nn.Embedding, adapters: Sequence[Vectors], batch: BatchValue[Tensor]) -> None:
        length = max(len(adapter.prompt) for adapter in adapters)
        rank = max(len(adapter.b1) for adapter in adapters)
        prompts = [F.pad(adapter.prompt, (0, 0, length - len(adapter.prompt), 0)) for adapter in adapters]
        super().__init__(table, StackedPrompts(torch.cat(prompts)))
        padding = [rank - len(adapter.b1) for adapter in adapters]
        stacks = {
            "w_down": [F.pad(one.w_down, (0, more)) for one, more in zip(adapters, padding, strict=True)],
            "b1": [F.pad(one.b1, (0, more)) for one, more in zip(adapters, padding, strict=True)],
            "w_up": [F.pad(one.w_up, (0, 0, 0, more)) for one, more in zip(adapters, padding, strict=True)],
            "b2": [one.b2 for one in adapters],
        }
        for name, values in stacks.items():
            self.register_buffer(name, torch.stack(values), persistent=False)
        self.batch = batch

    @override
    def add_offset(self, tokens: Tensor, token_ids: Tensor) -> Tensor:
        assert self.batch.value is not None
        rows = for_rows(self.batch.value, len(tokens))
        hidden = F.relu(tokens @ self.w_down[rows] + self.b1[rows, None])
        return tokens + (hidden @ self.w_up[rows] + self.b2[rows, None])


class MixedAdapters(MethodDefaults):
    """Adapters by name, each row of a batch read with one of them or with none."""

    def __init__(self) -> None:
        self.config: MethodConfig | None = None
        self.num_virtual_tokens = 0
        self.batch: BatchValue[Tensor] = BatchValue()
        self._vectors: dict[str, Vectors] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters; those of an adapter with a prompt for each of several tasks are NAME/TASK."""
        return tuple(self._vectors)

    @override
    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        self._reader: Any = backbone.get_encoder() if backbone.config.is_encoder_decoder else backbone
        self._backbone = backbone
        self._table = cast(nn.Embedding, self._reader.get_input_embeddings())

    def add(self, adapters: Mapping[str, tuple[Adapter, Method]]) -> None:
        """Add adapters, each with its method, not injected yet; those of the same name are replaced.

        Raises:
            UserError: A method's vectors depend on more than the token, or its values do not fit its settings.
        """
        vectors = dict(self._vectors)
        for name, (adapter, method) in adapters.items():
            if not isinstance(adapter.method, BY_TOKEN):
                raise UserError(
                    f"the adapter {name!r} of {adapter.folder} is of method {adapter.method.name!r}, which is neither "
                    "a soft prompt nor a function of single tokens, so rows of one batch cannot be read with different "
                    "ones; expected methods adept, pt, p_tuning, dpt, residual_pt or mpt"
                )
            # Each is put into the backbone as if it was alone, and its values are taken out again.
            self._reader.set_input_embeddings(self._table)
            method.inject(self._backbone, None, None)
            load_values(method, adapter.tensors)
            vectors |= _vectors_of(name, adapter, cast(PromptedMethod, method))
        self._vectors = vectors
        width = self._table.embedding_dim
        none = Vectors(*(torch.zeros(shape) for shape in ((0, width), (width, 0), 0, (0, width), width)))
        self._embedding = MixedEmbedding(self._table, [none, *vectors.values()], self.batch)
        self._embedding.to(self._table.weight.device)
        self._embedding.eval()
        self._reader.set_input_embeddings(self._embedding)
        lengths = [0, *(len(one.prompt) for one in vectors.values())]
        self.num_virtual_tokens = max(lengths)
        self._lengths = torch.tensor(lengths)

    def length(self, name: str | None) -> int:
        """Vectors of an adapter's prompt.

        Raises:
            UserError: There is none of this name.
        """
        return int(self._lengths[self.numbers([name])[0]])

    def numbers(self, names: Sequence[str | None]) -> Tensor:
        """Number of the adapter of each row [B]; 0 for none.

        Raises:
            UserError: There is none of a name.
        """
        known: dict[str | None, int] = {None: 0, **{name: number for number, name in enumerate(self._vectors, 1)}}
        for name in names:
            if name not in known:
                near = did_you_mean(name or "", self._vectors)
                raise UserError(f"adapter_names has {name!r}; loaded are {', '.join(self._vectors)}{near}")
        return torch.tensor([known[name] for name in names])

    @override
    def prompt_mask(self, prompts: Tensor) -> Tensor:
        places = torch.arange(self.num_virtual_tokens, device=prompts.device)
        lengths = self._lengths.to(prompts.device)[prompts]
        return (places >= self.num_virtual_tokens - lengths[:, None]).long()

    @override
    def for_batch(self, context: Tensor, task_ids: Tensor, example_ids: Tensor | None = None) -> Tensor:
        """The numbers of the adapters, which stand in the place of tasks here."""
        return task_ids

    @override
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {}

    @override
    def disabled(self) -> AbstractContextManager[None]:
        return attribute_set(self._embedding, "enabled", False)


def _vectors_of(name: str, adapter: Adapter, method: PromptedMethod) -> dict[str, Vectors]:
    """The vectors of an adapter by name, several if it has a prompt for each of several tasks."""
    embedding, length, tasks = method.embedding, method.num_virtual_tokens, adapter.method.prompt_tasks
    width, count = embedding.embedding_dim, max(1, len(tasks))
    prompts = torch.zeros(count, length, width)
    if embedding.soft_prompt is not None:
        index = torch.arange(count * length, device=embedding.weight.device)
        prompts = embedding.soft_prompt(index).detach().view(count, length, width).cpu()
    network = [torch.zeros(shape) for shape in ((width, 0), 0, (0, width), width)]
    if isinstance(embedding, AdeptEmbedding) and embedding.offset_in_evaluation:
        parts = embedding.network
        network = [value.detach().float().cpu() for value in (parts.w_down, parts.b1, parts.w_up, parts.b2)]
    names = [f"{name}/{task}" for task in tasks] or [name]
    return {one: Vectors(prompt, *network) for one, prompt in zip(names, prompts, strict=True)}

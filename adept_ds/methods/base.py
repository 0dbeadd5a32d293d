"""The protocol that every tuning method implements."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.config.method import MethodConfig
from adept_ds.storage.adapter_folder import Adapter, check_tensors


@dataclass(frozen=True)
class Distillation:
    """How training follows teachers, see `adept_ds.model.distillation`."""

    first_teacher: int
    """The teacher of a row with prompt k is prompt `first_teacher` + k."""
    weight: float
    """The factor w."""
    temperature: float
    """The temperature T."""


class Method(Protocol):
    """What a tuning method gives to the model, the optimizer and the adapter file.

    A method is made for one backbone, changes it in place in `inject`, and from then on answers for its own
    parameters. Nothing outside a method knows what they are.
    """

    config: MethodConfig | None
    """The settings it was made from; None for the backbone as it is."""
    num_virtual_tokens: int
    """Soft-prompt tokens l in front of the input; those of prompt k have the ids V + k l .. V + (k + 1) l - 1."""
    distillation: Distillation | None
    """How training follows teachers; None if it has none."""
    prompt_is_shared: bool
    """Whether rows with prompts of one number read the same vectors, which do not depend on the rows."""

    @abstractmethod
    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        """Change the frozen backbone in place and create the trained parameters on it.

        `generator` (CPU) is the only source of randomness, so that all ranks create the same values. Without one, the
        values are left to be loaded. Parameters that are added are fp32, on the device of the backbone's embedding
        table.
        """

    @abstractmethod
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Name to parameter of all that is trained. The names are the keys of the adapter file."""

    @abstractmethod
    def learning_rate_group(self, name: str) -> str:
        """Field of `train.learning_rate` with the peak learning rate of the trained parameter `name`."""

    @abstractmethod
    def constants(self) -> dict[str, Tensor]:
        """Name to tensor of what the adapter file holds beside the trained parameters: fp32 values that are never
        trained. They are the tensors in use, so that an adapter is loaded by copying into them."""

    @abstractmethod
    def start_values(self, source: Adapter) -> dict[str, Tensor]:
        """Values to start training from, made of those of `source`, an adapter of the same method: one for every name
        in the adapter file."""

    @abstractmethod
    def prompt_mask(self, prompts: Tensor) -> Tensor:
        """Which of the l prompt tokens of each row are there [B, l], 1 or 0, for the numbers of their prompts [B]."""

    @abstractmethod
    def reading(
        self, context: Tensor, prompts: Tensor, example_ids: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Context in which the backbone reads a batch, or generates from it.

        Some methods make a prompt for each row from the row's own tokens. `context` [B, l + S] is true at the tokens
        that it may depend on, and false at padding, at the prompt itself, and at what is to be predicted. `prompts` [B]
        are the numbers of the rows' prompts.

        Rows may be packed, and then every example in a row has a prompt of its own in front: `example_ids` [B, l + S]
        says by its number which one a position is of, 0 where it is of none, and `prompts` [B, l + S] are those of
        positions. Less than (l + S) // (l + 1) examples fit into a row, or as many.
        """

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Context in which the backbone computes what it did before `inject`."""


class MethodDefaults(Method):
    """What most methods answer to `Method`: one learning rate, `adapter`, nothing beside the trained parameters in the
    adapter file, and no interest in the batch that is read."""

    distillation: Distillation | None = None
    prompt_is_shared = True

    def __init__(self, config: Any) -> None:
        self.config = config
        self.num_virtual_tokens = config.num_virtual_tokens

    @override
    def learning_rate_group(self, name: str) -> str:
        return "adapter"

    @override
    def constants(self) -> dict[str, Tensor]:
        return {}

    @override
    def start_values(self, source: Adapter) -> dict[str, Tensor]:
        return source.tensors

    @override
    def prompt_mask(self, prompts: Tensor) -> Tensor:
        return prompts.new_ones(len(prompts), self.num_virtual_tokens)

    @override
    def reading(
        self, context: Tensor, prompts: Tensor, example_ids: Tensor | None = None
    ) -> AbstractContextManager[None]:
        return nullcontext()


@torch.no_grad()
def load_values(method: Method, values: Mapping[str, Tensor]) -> None:
    """Copy the values of an adapter file by their names into an injected method. Parameters must not be sharded.

    Raises:
        UserError: A name is missing or unknown, or a shape is another one.
    """
    places: dict[str, Tensor] = {**method.trained_parameters(), **method.constants()}
    check_tensors(values, {name: tuple(place.shape) for name, place in places.items()})
    for name, place in places.items():
        place.copy_(values[name])

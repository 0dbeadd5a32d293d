"""The protocol that every tuning method implements."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adept_ds.config.method import MethodConfig
from adept_ds.storage.adapter_folder import Adapter


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

    num_virtual_tokens: int
    """Soft-prompt tokens l in front of the input; those of prompt k have the ids V + k l .. V + (k + 1) l - 1."""
    distillation: Distillation | None
    """How training follows teachers; None if it has none."""

    @property
    def config(self) -> MethodConfig | None:
        """The settings it was made from; None for the backbone as it is."""

    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        """Change the frozen backbone in place and create the trained parameters on it.

        `generator` (CPU) is the only source of randomness, so that all ranks create the same values. Without one, the
        values are left to be loaded. Parameters that are added are fp32, on the device of the backbone's embedding
        table.
        """

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Name to parameter of all that is trained. The names are the keys of the adapter file."""

    def learning_rate_group(self, name: str) -> str:
        """Field of `train.learning_rate` with the peak learning rate of the trained parameter `name`."""

    def constants(self) -> dict[str, Tensor]:
        """Name to tensor of what is in the adapter file beside the trained parameters: fp32 values that are never
        trained, in their place, so that loading an adapter is copying into them."""

    def start_values(self, source: Adapter) -> dict[str, Tensor]:
        """What to load where training starts from an adapter of this method: all that the adapter file has of it."""

    def reading(self, context: Tensor) -> AbstractContextManager[None]:
        """Context in which the backbone reads a batch, or generates from it.

        `context` [B, l + S] is true where a token stands that a soft prompt made for its row may depend on: not at
        padding, at the prompt itself or at what is to be predicted.
        """

    def disabled(self) -> AbstractContextManager[None]:
        """Context in which the backbone computes what it did before `inject`."""


class MethodDefaults:
    """What most methods answer to the questions of `Method` that only some have an answer of their own to."""

    distillation: Distillation | None = None

    def constants(self) -> dict[str, Tensor]:
        """See `Method.constants`; here none."""
        return {}

    def start_values(self, source: Adapter) -> dict[str, Tensor]:
        """See `Method.start_values`; here the source as it is."""
        return source.tensors

    def reading(self, context: Tensor) -> AbstractContextManager[None]:
        """See `Method.reading`; here every row is read alike."""
        return nullcontext()

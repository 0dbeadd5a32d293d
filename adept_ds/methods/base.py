"""The protocol that every tuning method implements."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

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


Value = TypeVar("Value")


class BatchValue(Generic[Value]):
    """What a method has for the batch that is being read: its modules keep this object, and look at `value`.

    There is a value only within `holding`. A layer that is computed again in the backward pass, which comes later,
    finds the value that it had in its own forward pass (`recomputed`), so tensors that were made for the batch live
    until its backward pass is over, and no longer.
    """

    def __init__(self) -> None:
        self.value: Value | None = None

    def holding(self, value: Value | None) -> AbstractContextManager[None]:
        """Context in which this is the value; it may be entered again after it was left."""
        return _Holding(self, value)

    def recomputed(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of `torch.utils.checkpoint`: contexts for a layer's forward pass and for its repetition."""
        return nullcontext(), self.holding(self.value)


class _Holding(AbstractContextManager[None]):
    def __init__(self, batch: BatchValue[Any], value: Any) -> None:
        self.batch, self.value = batch, value

    @override
    def __enter__(self) -> None:
        self.before, self.batch.value = self.batch.value, self.value

    @override
    def __exit__(self, *error: object) -> None:
        self.batch.value = self.before


def for_rows(values: Tensor, rows: int) -> Tensor:
    """Return the values [B, ...] of a batch's rows for the `rows` that are read: beams are copies of a row, side by
    side."""
    return values.repeat_interleave(rows // values.shape[0], 0)


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
    batch: BatchValue[Any] | None
    """What its modules look at while a batch is read; None if all rows of all batches are read alike."""
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
        trained, named in `CONSTANTS` of `adept_ds.config.method`. They are the tensors in use, so that an adapter is
        loaded by copying into them."""

    @abstractmethod
    def start_values(self, source: Adapter) -> dict[str, Tensor]:
        """Values to start training from, made of those of `source`, an adapter of the same method: one for every name
        in the adapter file."""

    @abstractmethod
    def prompt_mask(self, prompts: Tensor) -> Tensor:
        """Which of the l prompt tokens of each row are there [B, l], 1 or 0, for the numbers of their prompts [B]."""

    @abstractmethod
    def for_batch(self, context: Tensor, task_ids: Tensor, example_ids: Tensor | None = None) -> Any:
        """Return the value of `batch` with which the backbone reads these rows, or generates from them.

        It is asked for once for a forward pass or a generation, and on all ranks alike. Modules that make weights for
        the batch are called here, for all tasks whatever the rows are of: under ZeRO-3 each call gathers parameters
        from all ranks, so all must make the same calls. They are modules of the backbone, as all that is trained is,
        and return tensors, or tuples or dicts of such: in anything else the engine does not find what it gathers
        parameters for again in the backward pass.

        Args:
            context: True at the tokens that what is made for a row may depend on; false at padding, at the prompt
                itself, and at what is to be predicted [B, l + S].
            task_ids: Number in `prompt_tasks` of each row's task; 0 where there are no such tasks [B]. Beams of a row
                follow it, see `for_rows`. Of packed rows that of each position's example [B, l + S].
            example_ids: Of packed rows, in which every example has a prompt of its own in front: the number in its row
                of each position's example, from 1 on, 0 where it is of none [B, l + S]. Less than (l + S) // (l + 1)
                examples fit into a row, or as many.
        """

    @abstractmethod
    def unchanging(self) -> AbstractContextManager[None]:
        """Context in which no trained value changes, so that what is made of these alone need be made only once. All
        ranks enter it alike."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Context in which the backbone computes what it did before `inject`."""


class MethodDefaults(Method):
    """What most methods answer to `Method`: one learning rate, `adapter`, nothing beside the trained parameters in the
    adapter file, and no interest in the batch that is read."""

    distillation: Distillation | None = None
    batch: BatchValue[Any] | None = None
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
    def for_batch(self, context: Tensor, task_ids: Tensor, example_ids: Tensor | None = None) -> Any:
        return None

    @override
    def unchanging(self) -> AbstractContextManager[None]:
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

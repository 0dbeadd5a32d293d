"""Rows of a causal model that are read and decoded side by side, each coming and going at its own time.

All rows end at the same column of a key/value cache with room behind it:

    column       0 1 2 3 4 5 6 7
    row 0        . a b c d e f _        a .. f: tokens of row 0, among them its soft prompt
    row 1        . . . . g h i _        . : masked, _ : where the next token's keys and values go

So a step writes one column and copies nothing, a row that ends leaves its place to one that was read meanwhile, and
columns that no row begins before are not looked at any more. What a row computes depends on its own columns alone:
masked ones have no weight, and positions count a row's own tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer

from adept_ds.model.adapted_model import AdaptedModel

SPARE_COLUMNS = 64
"""Columns behind those of the longest row: rows are moved to the front once in so many steps."""
_NEEDED = ("attention_mask", "position_ids", "past_key_values")

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values [B, heads, S, width] of each layer."""


def refusal(model: AdaptedModel) -> str | None:
    """Why rows of this model cannot come and go; None if they can.

    They can where a row's past is nothing but keys and values for each of its tokens, and the backbone is told by mask
    and positions which these are.
    """
    backbone = model.backbone
    if model.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if type(backbone).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return "it prepares the input of each step in a way of its own"
    taken = inspect.signature(type(backbone).forward).parameters
    if missing := [name for name in _NEEDED if name not in taken]:
        return f"it does not take {' and '.join(missing)}"
    layers = DynamicCache(config=backbone.config).layers
    if other := sorted({type(layer).__name__ for layer in layers} - {DynamicLayer.__name__}):
        return f"its cache has other layers than keys and values of all tokens ({', '.join(other)})"
    return None


@dataclass
class ReadPrompts:
    """Prompts that have been read, the rows right-aligned: all end at the last column."""

    layers: Layers
    lengths: list[int]
    """Columns of each row, from the last one back."""
    hidden: int
    """How many of these the method has put there, which no position counts."""
    scores: Tensor
    """What follows each prompt: fp32 logits [B, V]."""
    prompts: Tensor
    """Number of each row's soft prompt [B]."""


class PromptReader:
    """Reads prompts in groups. What all of them begin with, soft prompt and first tokens, is read once, here.

    The soft prompt is read with the row where it depends on it (`Method.prompt_is_shared`).

    Args:
        model: In evaluation mode, with `refusal` None.
        prompts: Token ids of all prompts; none is empty.
        task_ids: Number of each one's task, None for all if the method has no tasks.
        adapter: Of several adapters, the one that reads.
        device: The model's.
    """

    def __init__(
        self,
        model: AdaptedModel,
        prompts: Sequence[Sequence[int]],
        task_ids: Sequence[int | None],
        adapter: str | None,
        device: torch.device,
    ) -> None:
        model.check_ids(max(map(max, prompts)))
        self._model, self._prompts, self._device = model, prompts, device
        ids = torch.zeros(len(prompts), 1, dtype=torch.long, device=device)
        tasks = None if None in task_ids else torch.tensor(task_ids, device=device)
        names = [adapter] * len(prompts) if model.adapter_names else None
        self._numbers = model.row_prompts(ids, tasks, names)
        self._front: DynamicCache | None = None
        self._common = 0
        if model.method.prompt_is_shared:
            self._common = _common_length(prompts)
            self._read_front()

    def _read_front(self) -> None:
        kinds, self._kinds = self._numbers.unique(return_inverse=True)
        ids, mask = self._model.prompt_ids(kinds)
        common = torch.tensor(self._prompts[0][: self._common], dtype=torch.long, device=self._device)
        common = common.expand(len(kinds), -1)
        ids, self._front_mask = torch.cat([ids, common], 1), torch.cat([mask, torch.ones_like(common)], 1)
        if ids.shape[1]:
            self._front = self._model.extend(ids, self._front_mask, kinds, DynamicCache()).past_key_values

    def read(self, numbers: Sequence[int]) -> ReadPrompts:
        """Read the prompts of these numbers in one call of the backbone."""
        rows = [self._prompts[number][self._common :] for number in numbers]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        which = torch.tensor(numbers, device=self._device)
        prompts, cache, context = self._numbers[which], DynamicCache(), None
        if self._front is not None:
            kinds = self._kinds[which]
            mask = torch.cat([self._front_mask[kinds], mask], 1)
            for index, (keys, values) in enumerate(_layers(self._front)):
                cache.update(keys[kinds], values[kinds], index)
        elif not self._model.method.prompt_is_shared:
            context = mask
            ids, mask = self._model.add_prompt(ids, mask, prompts)
        output = self._model.extend(ids, mask, prompts, cache, context=context)
        layers = _layers(output.past_key_values)
        hidden = layers[0][0].shape[2] - mask.shape[1]
        mask = torch.cat([mask.new_ones(len(rows), hidden), mask], 1)
        # Stable, so that a row's tokens keep their order, and masked columns come first.
        order = mask.sort(dim=1, stable=True).indices
        return ReadPrompts(
            [(_columns(keys, order), _columns(values, order)) for keys, values in layers],
            mask.sum(1).tolist(),
            hidden,
            output.logits[:, -1].float(),
            prompts,
        )

    def read_nothing(self) -> None:
        """Call the backbone as `read` and `Slots.step` do, for ranks that wait for others: of one token."""
        one = torch.ones(1, 1, dtype=torch.long, device=self._device)
        self._model.extend(one * self._prompts[0][-1], one, self._numbers[:1], DynamicCache())


def _common_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts have in common, each with one more behind them."""
    most = min(map(len, prompts)) - 1
    columns = zip(*(ids[:most] for ids in prompts), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _layers(cache: Any) -> Layers:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _columns(values: Tensor, order: Tensor) -> Tensor:
    """The columns of each row [B, heads, S, width] in another order [B, S]."""
    return values.gather(2, order[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3]))


class _RoomyLayer(DynamicLayer):
    """A layer's keys and values as a part of the columns of two buffers, to which a step adds one in place."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.buffers = keys, values

    def show(self, first: int, end: int) -> None:
        self._first, self._end = first, end
        self.keys, self.values = (buffer[:, :, first:end] for buffer in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self._end + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._end : end] = states
        self.show(self._first, end)
        return self.buffers[0][:, :, self._first : end], self.buffers[1][:, :, self._first : end]


class Slots:
    """Places for rows that are decoded token by token.

    Args:
        model: As `PromptReader`.
        like: Prompts that have been read, for the shapes.
        places: How many rows there can be at a time.
        longest: Columns of the longest prompt of all.
        new_tokens: The most tokens that a row gets behind it.
    """

    def __init__(self, model: AdaptedModel, like: ReadPrompts, places: int, longest: int, new_tokens: int) -> None:
        self._model, self._hidden, self._longest = model, like.hidden, longest
        columns = longest + new_tokens + SPARE_COLUMNS
        # Zeros: what is masked must be a number.
        self._layers = [
            _RoomyLayer(*(states.new_zeros(places, states.shape[1], columns, states.shape[3]) for states in both))
            for both in like.layers
        ]
        self._mask = like.prompts.new_zeros(places, columns)
        self._prompts = like.prompts.new_zeros(places)
        self._lengths = [0] * places
        """Columns of each row; 0 where there is none."""
        self._end = longest

    @property
    def free(self) -> list[int]:
        """The places without a row."""
        return [place for place, length in enumerate(self._lengths) if not length]

    def __len__(self) -> int:
        return len(self._lengths)

    def put(self, places: Sequence[int], read: ReadPrompts, rows: Sequence[int]) -> None:
        """Put rows of what has been read into free places; a row may go into several."""
        device, width = self._mask.device, max(read.lengths[row] for row in rows)
        to, source = torch.tensor(places, device=device), torch.tensor(rows, device=device)
        columns = slice(self._end - width, self._end)
        for layer, both in zip(self._layers, read.layers, strict=True):
            for buffer, states in zip(layer.buffers, both, strict=True):
                buffer[to, :, columns] = states[source, :, -width:]
        self._prompts[to] = read.prompts[source]
        self._mask[to] = 0
        for place, row in zip(places, rows, strict=True):
            self._lengths[place] = read.lengths[row]
            self._mask[place, self._end - read.lengths[row] : self._end] = 1

    def remove(self, place: int) -> None:
        """Make a place free."""
        self._lengths[place] = 0

    def keep(self, places: Sequence[int]) -> None:
        """Give up all other places; those of the rows that stay are numbered anew, in this order."""
        rows = torch.tensor(places, device=self._mask.device)
        for layer in self._layers:
            keys, values = layer.buffers
            layer.buffers = keys[rows], values[rows]
        self._mask, self._prompts = self._mask[rows], self._prompts[rows]
        self._lengths = [self._lengths[place] for place in places]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to the row in each place (any one where there is none); return fp32 logits [places, V]."""
        if self._end == self._mask.shape[1]:
            self._move_to_front()
        first, device = self._end - max(self._lengths), self._mask.device
        for layer in self._layers:
            layer.show(first, self._end)
        self._mask[:, self._end] = 1
        self._end += 1
        positions = torch.tensor([max(0, length - self._hidden) for length in self._lengths])
        output = self._model.extend(
            torch.tensor(tokens)[:, None].to(device),
            self._mask[:, first : self._end],
            self._prompts,
            Cache(layers=list(self._layers)),
            positions[:, None].to(device),
        )
        self._lengths = [length + 1 if length else 0 for length in self._lengths]
        return output.logits[:, -1].float()

    def _move_to_front(self) -> None:
        width = max(self._lengths)
        end = max(width, self._longest)
        for values in (*(buffer for layer in self._layers for buffer in layer.buffers), self._mask[:, None, :, None]):
            values[:, :, end - width : end] = values[:, :, self._end - width : self._end].clone()
        self._mask[:, : end - width] = 0
        self._end = end

"""Packed rows: the same losses and gradients as one example a row, and nothing of a neighbour in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adept_ds.config.method import FullConfig, MethodConfig
from adept_ds.data.encode import Encoded, collate, collate_packed
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.model.loss import IGNORE_INDEX
from tests.models import PAD, VOCABULARY, causal, seeded
from tests.test_methods import METHODS, far_from_start, source_prompts  # noqa: F401
from tests.tolerances import assert_equal_up_to_rounding

Make = Callable[[str], PreTrainedModel]
ROW = 40
DECODERS = {
    "llama": lambda attention: seeded(causal("llama", num_key_value_heads=2, attn_implementation=attention)),
    "mistral": lambda attention: seeded(
        causal("mistral", num_key_value_heads=2, sliding_window=5, attn_implementation=attention)
    ),
    "gpt2": lambda attention: seeded(causal("gpt2", n_positions=40, attn_implementation=attention)),
}


def example(length: int, seed: int, task: int | None = None, labels_from: int = 2) -> Encoded:
    ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [IGNORE_INDEX] * labels_from + ids[labels_from:]
    return Encoded(ids, labels, False, False, False, task)


EXAMPLES = [example(length, seed, seed % 2) for seed, length in enumerate((6, 9, 4, 7, 3))]
"""Of two tasks."""
ROWS = [[0, 2, 4], [1, 3], []]
"""Which of them stand in which row."""


def packed(model: AdaptedModel, examples: list[Encoded] = EXAMPLES) -> dict[str, Tensor]:
    rows = [[examples[index] for index in row] for row in ROWS]
    return collate_packed(rows, ROW, model.num_virtual_tokens, PAD)


def losses_and_gradients(model: AdaptedModel, *batches: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = torch.zeros(())
    for batch in batches:
        part = model(**batch, reduction="sum").loss
        part.backward()
        loss = loss + part.detach()
    return loss, {
        name: value.grad.clone() for name, value in model.trainable_parameters().items() if value.grad is not None
    }


def assert_same_training(model: AdaptedModel) -> None:
    loss, gradients = losses_and_gradients(model, packed(model))
    right, expected = losses_and_gradients(model, *(collate([one], PAD) for one in EXAMPLES))
    assert_equal_up_to_rounding(loss, right)
    assert gradients.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert_equal_up_to_rounding(gradients[name], gradient, largest)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [*METHODS, "full"])
def test_gradients_of_packed_rows_are_those_of_single_ones(method: str, attention: str) -> None:
    config: MethodConfig = FullConfig() if method == "full" else METHODS[method]
    backbone = DECODERS["llama"](attention)
    assert_same_training(far_from_start(get_adept_model(backbone, config)).train())


@pytest.mark.parametrize("method", ["adept", "attempt", "prefix", "lora"])
@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_windows_and_learned_positions_begin_with_each_example(name: str, method: str) -> None:
    assert_same_training(far_from_start(get_adept_model(DECODERS[name]("sdpa"), METHODS[method])).train())

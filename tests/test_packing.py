"""Packed rows: the same losses and gradients as one example a row, and nothing of a neighbour in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, Lfm2Config, MambaConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adept_ds.backbone.load import resolve_architecture
from adept_ds.config.method import FullConfig, MethodConfig, MptConfig
from adept_ds.config.run import DataConfig, RunConfig
from adept_ds.data.encode import Encoded, collate, collate_packed
from adept_ds.errors import UserError
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.model.loss import IGNORE_INDEX
from adept_ds.planner.packing import _attend, check_packing
from tests.models import PAD, VOCABULARY, causal, seeded, t5_config
from tests.test_meta_step import gpt2, llama, run_of
from tests.test_methods import METHODS, OF_CAUSAL_MODELS, far_from_start, source_prompts  # noqa: F401
from tests.tolerances import assert_equal_up_to_rounding

ROW = 40
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "gpt2": {"n_positions": ROW},
}


def backbone(name: str, attention: str | None = None) -> PreTrainedModel:
    return seeded(causal(name, attn_implementation=attention, **BACKBONES[name]))


def example(length: int, seed: int) -> Encoded:
    """All but the first two tokens are learnt; those with an odd seed are of another task."""
    ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded(ids, [IGNORE_INDEX] * 2 + ids[2:], False, False, False, seed % 2)


EXAMPLES = [example(length, seed) for seed, length in enumerate((6, 9, 4, 7, 3))]
ROWS = [[0, 2, 4], [1, 3], []]


def packed(model: AdaptedModel) -> dict[str, Tensor]:
    return collate_packed([[EXAMPLES[i] for i in row] for row in ROWS], ROW, model.num_virtual_tokens, PAD)


def loss_and_gradients(
    model: AdaptedModel, *batches: dict[str, Tensor], smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    losses = [model(**batch, reduction="sum", label_smoothing=smoothing).loss for batch in batches]
    torch.stack(losses).sum().backward()
    named = {name: value.grad for name, value in model.trainable_parameters().items()}
    gradients = {name: grad.clone() for name, grad in named.items() if grad is not None}
    return torch.stack(losses).sum().detach(), gradients


def assert_same_training(model: AdaptedModel, smoothing: float = 0.0) -> None:
    """In fp64, so that what is left is the rounding of the loss, which is fp32; prefix tuning's vectors are cast."""
    model.train()
    if "prefix" not in model.method.config.name:
        model.double()
    loss, gradients = loss_and_gradients(model, packed(model), smoothing=smoothing)
    right, expected = loss_and_gradients(model, *(collate([one], PAD) for one in EXAMPLES), smoothing=smoothing)
    assert_equal_up_to_rounding(loss.float(), right.float())
    assert gradients.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert_equal_up_to_rounding(gradients[name].float(), gradient.float(), largest)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [*OF_CAUSAL_MODELS, "full"])
def test_gradients_of_packed_rows_are_those_of_single_ones(method: str, attention: str) -> None:
    config: MethodConfig = FullConfig() if method == "full" else METHODS[method]
    assert_same_training(far_from_start(get_adept_model(backbone("llama", attention), config)))


@pytest.mark.parametrize("method", ["adept", "dept", "attempt", "prefix", "lora", "lst"])
@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_windows_and_learned_positions_begin_with_each_example(name: str, method: str) -> None:
    assert_same_training(far_from_start(get_adept_model(backbone(name), METHODS[method])))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_teacher_reads_the_same_packed_rows(smoothing: float) -> None:
    config = MptConfig(num_virtual_tokens=6, tasks=("a", "b"), teachers={"a": "x", "b": "y"})
    assert_same_training(far_from_start(get_adept_model(backbone("llama"), config)), smoothing)


@pytest.mark.parametrize("method", ["adept", "full"])
def test_labels_are_smoothed_alike_in_packed_rows(method: str) -> None:
    model = far_from_start(get_adept_model(backbone("llama"), FullConfig() if method == "full" else METHODS[method]))
    assert_same_training(model, smoothing=0.1)


@pytest.mark.parametrize("method", ["adept", "attempt", "hyperformer-tasks", "lst", "full"])
def test_recomputed_layers_read_the_same_packed_rows(method: str) -> None:
    model = get_adept_model(backbone("llama"), FullConfig() if method == "full" else METHODS[method])
    model.checkpoint_activations()
    assert_same_training(model)


@contextmanager
def flash_stand_in(model: AdaptedModel) -> Iterator[None]:
    """The backbone attends as flash attention does: within the sequences that it is told of, and by no mask."""
    ALL_ATTENTION_FUNCTIONS["flash_stand_in"] = _attend
    model.backbone.config._attn_implementation = "flash_stand_in"
    yield
    del ALL_ATTENTION_FUNCTIONS["flash_stand_in"]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", ["adept", "attempt", "mpt-tasks", "lora"])
def test_flash_attention_is_told_where_examples_begin(name: str, method: str) -> None:
    model = far_from_start(get_adept_model(backbone(name), METHODS[method]))
    with flash_stand_in(model):
        assert_same_training(model)


@pytest.mark.slow
def test_flex_attention_blocks_the_same() -> None:
    flex, sdpa = (
        far_from_start(get_adept_model(backbone("llama", attention), METHODS["adept"]))
        for attention in ("flex_attention", "sdpa")
    )
    with torch.no_grad():  # on a CPU it has no backward pass
        assert_equal_up_to_rounding(flex(**packed(flex)).loss, sdpa(**packed(sdpa)).loss)


@pytest.mark.parametrize("method", ["adept", "attempt", "prefix", "full"])
def test_a_neighbour_has_no_effect(method: str) -> None:
    """Not to rounding, but to the bit: the products are the same, of which some are masked."""
    config: MethodConfig = FullConfig() if method == "full" else METHODS[method]
    model = far_from_start(get_adept_model(backbone("llama"), config)).train()
    batch = packed(model)
    is_second = batch["example_ids"][0] == 2
    batch["labels"][0][~is_second] = IGNORE_INDEX
    batch["labels"][1:] = IGNORE_INDEX
    loss, gradients = loss_and_gradients(model, batch)
    is_other = (batch["attention_mask"] == 1) & ~(is_second & (torch.arange(len(ROWS)) == 0)[:, None])
    batch["input_ids"] = torch.where(is_other, (batch["input_ids"] + 5) % VOCABULARY, batch["input_ids"])
    changed_loss, changed = loss_and_gradients(model, batch)
    assert torch.equal(loss, changed_loss)
    assert all(torch.equal(changed[name], gradient) for name, gradient in gradients.items())


def test_bf16_follows_within_its_rounding() -> None:
    """Half a percent of the loss, and a twentieth of the largest gradient, whose sums are rounded to 8 bits."""
    model = far_from_start(get_adept_model(backbone("llama"), METHODS["adept"])).train()
    model.backbone.bfloat16()
    loss, gradients = loss_and_gradients(model, packed(model))
    right, expected = loss_and_gradients(model, *(collate([one], PAD) for one in EXAMPLES))
    torch.testing.assert_close(loss, right, rtol=5e-3, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=largest / 20)


def test_a_first_token_with_a_label_is_predicted_by_no_neighbour() -> None:
    model = get_adept_model(backbone("llama"), METHODS["lora"]).double()
    whole = [Encoded(one.input_ids, one.input_ids, False, False, False) for one in EXAMPLES[:2]]
    together = model(**collate_packed([whole], ROW, 0, PAD), reduction="sum").loss
    alone = sum(model(**collate([one], PAD), reduction="sum").loss for one in whole)
    assert_equal_up_to_rounding(together, alone)


def test_rows_of_a_longer_form_have_one_shape_whatever_is_in_them() -> None:
    full, empty = (collate_packed(rows, ROW, 3, PAD) for rows in ([EXAMPLES[:2]], [[]]))
    assert {name: tensor.shape for name, tensor in full.items()} == {name: t.shape for name, t in empty.items()}
    assert full["input_ids"].shape == (1, ROW)
    assert int(full["attention_mask"].sum()) == sum(len(one.input_ids) for one in EXAMPLES[:2])


def run_packed(row: int = 1024, method: str = "adept", attention: str | None = None, **data: Any) -> RunConfig:
    run = run_of(train={"packing": row}, model={"attn_implementation": attention})
    return run.model_copy(update={"method": METHODS[method], "data": DataConfig(**data)})


HYBRID = Lfm2Config(num_hidden_layers=3, hidden_size=64, layer_types=["full_attention", "conv", "full_attention"])


@pytest.mark.parametrize(
    ("architecture", "attention", "reason"),
    [
        (MambaConfig(num_hidden_layers=2, hidden_size=32), None, "what an example's neighbour is changes its loss"),
        (HYBRID, None, "what an example's neighbour is changes its loss"),
        (AutoConfig.for_model("bloom"), None, "what an example's neighbour is changes its loss"),
        (AutoConfig.for_model("opt"), None, "what an example's neighbour is changes its loss"),
        (AutoConfig.for_model("gptj"), "flash_attention_2", "what an example's neighbour is changes its loss"),
        (AutoConfig.for_model("mpt"), None, "what an example's neighbour is changes its loss"),
        (t5_config(), None, "is for causal models; the encoder of"),
    ],
    ids=["recurrent", "convolution", "alibi", "no positions for the mask", "flash", "alibi of columns", "t5"],
)
def test_what_cannot_be_packed_exactly_is_refused(
    architecture: PreTrainedConfig, attention: str | None, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        check_packing(run_packed(attention=attention), architecture)


def test_models_at_full_size_are_tried_in_miniature() -> None:
    for name in ("meta-llama/Meta-Llama-3-8B", "Salesforce/codegen-350M-mono"):
        run = run_packed()
        run = run.model_copy(update={"model": run.model.model_copy(update={"name_or_path": name})})
        check_packing(run, resolve_architecture(run.model)[0])
    check_packing(run_packed(method="prefix"), llama())
    check_packing(run_packed(attention="flash_attention_2"), gpt2())


def test_prefix_tuning_has_no_flash_attention_on_packed_rows() -> None:
    with pytest.raises(UserError, match=r"packed rows, which works with attention eager and sdpa"):
        check_packing(run_packed(method="prefix", attention="flash_attention_2"), llama())


def test_a_row_has_room_for_the_longest_example() -> None:
    with pytest.raises(UserError, match=r"train.packing is 500.* data.max_length is 581.*expected train.packing of at"):
        check_packing(run_packed(500), llama())
    check_packing(run_packed(581), llama())
    tasks = {"format": "tasks", "tasks": ("rte",)}
    with pytest.raises(UserError, match=r"data.max_source_length and data.max_target_length"):
        check_packing(run_packed(200, **tasks), llama())


def test_the_number_of_forward_passes_is_not_a_setting() -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps does not go with packing"):
        run_of(train={"packing": 600, "gradient_accumulation_steps": 2})

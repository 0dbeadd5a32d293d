"""The chunked loss against cross-entropy over whole logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
)

from adept_ds.config.method import AdeptConfig
from adept_ds.errors import UserError
from adept_ds.model import loss as loss_module
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.model.loss import IGNORE_INDEX, LossHead, SoftTargets, shift_labels
from tests.models import EOS, PAD, START, VOCABULARY, WIDTH, llama_config
from tests.tolerances import assert_equal_up_to_rounding

SMOOTHING = [0.0, 0.1]


@pytest.fixture(params=[1, 3 * VOCABULARY, 2**25], ids=["row by row", "3 rows", "one chunk"])
def chunks(request, monkeypatch) -> Iterator[None]:
    """Run with chunks of several sizes."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", request.param)


def head_and_input(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Tensor]:
    """A head, hidden states [2, 8, 16] and targets of which five have a label."""
    torch.manual_seed(0)
    head = nn.Linear(16, VOCABULARY, bias=bias, dtype=dtype)
    targets = torch.full((2, 8), IGNORE_INDEX)
    targets[0, 2:5] = torch.tensor([4, 98, 0])
    targets[1, 6:] = torch.tensor([98, 7])
    return head, torch.randn(2, 8, 16, dtype=dtype, requires_grad=True), targets


def plain_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    rows = logits.float().flatten(0, 1)
    options = {"ignore_index": IGNORE_INDEX, "label_smoothing": smoothing}
    return F.cross_entropy(rows, targets.flatten(), reduction="sum", **options)


def chunked_loss(head: nn.Linear, hidden: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    loss_head = LossHead(head)
    with loss_head.summing(targets, label_smoothing=smoothing):
        return loss_head(hidden).sum()


def gradients(loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(2.5 * loss, tensors)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_with_a_trained_head(bias, smoothing):
    head, hidden, targets = head_and_input(bias)
    expected, actual = plain_loss(head(hidden), targets, smoothing), chunked_loss(head, hidden, targets, smoothing)
    torch.testing.assert_close(actual, expected)
    tensors = (hidden, *head.parameters())
    for a, b in zip(gradients(actual, *tensors), gradients(expected, *tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_with_a_frozen_head(bias, smoothing):
    head, hidden, targets = head_and_input(bias)
    head.requires_grad_(False)
    expected, actual = plain_loss(head(hidden), targets, smoothing), chunked_loss(head, hidden, targets, smoothing)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, hidden), gradients(expected, hidden))


def test_smoothing_is_of_one_loss_only():
    head, hidden, targets = head_and_input(bias=True)
    loss_head = LossHead(head)
    for smoothing in (0.1, 0.0):
        with loss_head.summing(targets, label_smoothing=smoothing):
            torch.testing.assert_close(loss_head(hidden).sum(), plain_loss(head(hidden), targets, smoothing))
    with loss_head.summing(targets):
        torch.testing.assert_close(loss_head(hidden).sum(), plain_loss(head(hidden), targets))


def test_a_frozen_head_leaves_one_gradient_of_the_labelled_rows_behind():
    head, hidden, targets = head_and_input(bias=True)
    head.requires_grad_(False)
    labelled = hidden[targets != IGNORE_INDEX]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape), lambda tensor: tensor):
        chunked_loss(head, labelled[None], targets[targets != IGNORE_INDEX][None])
    # Beside it only the mask that the rows were picked by.
    assert [shape for shape in saved if len(shape) == 2 and shape[1] == 16] == [labelled.shape]
    assert not any(VOCABULARY in shape for shape in saved)


@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_bf16_loss_is_computed_in_fp32(smoothing):
    head, hidden, targets = head_and_input(bias=False, dtype=torch.bfloat16)
    actual, logits = chunked_loss(head, hidden, targets, smoothing), head(hidden)
    assert actual.dtype == torch.float32
    # Both round the same logits to bf16, where another kernel may round each the other way: one step apart.
    step = torch.finfo(torch.bfloat16).eps * float(logits.detach().abs().max())
    expected = plain_loss(logits, targets, smoothing)
    # A label's loss is a logit, or a mean of logits, less another mean, and no more than two steps off.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2 * step * int((targets != IGNORE_INDEX).sum()))
    (gradient,), (reference,) = gradients(actual, hidden), gradients(expected, hidden)
    # The gradient of the logits, whose absolute values add up to 2 at most, is off by a step of the logits' and rounded
    # itself on its way through the head; so is the result.
    eps, weight = torch.finfo(torch.bfloat16).eps, float(head.weight.detach().abs().max())
    torch.testing.assert_close(gradient, reference, rtol=eps, atol=2.5 * weight * 2 * (step + eps / 2))


def test_no_label_at_all_gives_zero_and_zero_gradients():
    head, hidden, targets = head_and_input(bias=True)
    loss = chunked_loss(head, hidden, torch.full_like(targets, IGNORE_INDEX), smoothing=0.1)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(loss, hidden, *head.parameters()))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("bias", [False, True])
def test_soft_targets_add_the_divergence_from_a_teacher(bias, smoothing):
    head, hidden, targets = head_and_input(bias)
    head.requires_grad_(False)
    labelled, weight, temperature = targets != IGNORE_INDEX, 0.3, 1.7
    rows = torch.randn(int(labelled.sum()), 16)
    loss_head = LossHead(head)
    with loss_head.summing(targets, SoftTargets(rows, weight, temperature), smoothing):
        actual = loss_head(hidden).sum()
    ours, theirs = (head(states) / temperature for states in (hidden[labelled], rows))
    divergence = F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="sum")
    expected = plain_loss(head(hidden), targets, smoothing) + weight * divergence
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(gradients(loss, hidden)[0] for loss in (actual, expected)))
    torch.testing.assert_close(chunked_loss(head, hidden, targets), plain_loss(head(hidden), targets))


def test_a_recording_head_computes_nothing():
    head, hidden, targets = head_and_input(bias=False)
    loss_head = LossHead(head)
    with loss_head.recording(targets) as rows:
        assert loss_head(hidden).shape == (1, 1, 1)
    assert torch.equal(rows[0], hidden[targets != IGNORE_INDEX])
    assert loss_head(hidden).shape == (2, 8, VOCABULARY)


def test_outside_of_summing_the_head_gives_logits():
    head, hidden, targets = head_and_input(bias=True)
    loss_head = LossHead(head)
    with loss_head.summing(targets):
        loss_head(hidden)
    torch.testing.assert_close(loss_head(hidden), head(hidden))


def test_shift_labels():
    assert shift_labels(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, IGNORE_INDEX]]


def model_and_batch(make_backbone, name: str) -> tuple[AdaptedModel, dict[str, Tensor]]:
    """An adapted model with offsets, and a right-padded batch."""
    model = get_adept_model(make_backbone(name), AdeptConfig(num_virtual_tokens=3, bottleneck=2))
    torch.manual_seed(1)
    for parameter in model.trainable_parameters().values():
        nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = PAD, 0
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    if model.is_encoder_decoder:
        labels = torch.tensor([[7, 8, 9, EOS], [5, EOS, IGNORE_INDEX, IGNORE_INDEX]])
    else:
        labels[0, :4] = IGNORE_INDEX
        labels[1, :2] = IGNORE_INDEX
    return model, {"input_ids": ids, "attention_mask": mask, "labels": labels}


def bart() -> PreTrainedModel:
    """With a bias behind the head that is not zero."""
    sides = ("encoder", "decoder")
    sizes = {
        f"{side}_{name}": value
        for side in sides
        for name, value in (("layers", 1), ("ffn_dim", 48), ("attention_heads", 4))
    }
    tokens = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": START, "decoder_start_token_id": EOS}
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, max_position_embeddings=64, dropout=0.0, **sizes, **tokens
    )
    model = BartForConditionalGeneration(config)
    nn.init.normal_(model.final_logits_bias)
    return model


def loss_by_whole_logits(model: AdaptedModel, batch: dict[str, Tensor], smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy from the model's own logits."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if model.is_encoder_decoder:
        inputs["decoder_input_ids"] = model.backbone.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        logits, targets = model(**inputs).logits, batch["labels"]
    else:
        logits, targets = model(**inputs).logits[:, model.num_virtual_tokens :][:, :-1], batch["labels"][:, 1:]
    options = {"ignore_index": IGNORE_INDEX, "label_smoothing": smoothing}
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **options)


def assert_loss_and_gradients_are_those_of_whole_logits(
    model: AdaptedModel, batch: dict[str, Tensor], smoothing: float
) -> None:
    parameters = list(model.trainable_parameters().values())
    actual = model(**batch, label_smoothing=smoothing).loss
    expected = loss_by_whole_logits(model, batch, smoothing)
    assert_equal_up_to_rounding(actual, expected)
    for a, b in zip(gradients(actual, *parameters), gradients(expected, *parameters), strict=True):
        assert b.any()
        assert_equal_up_to_rounding(a, b)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("name", ["llama", "gpt2", "codegen", "t5-tied", "t5-untied"])
def test_models_loss_and_gradients_are_those_of_whole_logits(make_backbone, name, smoothing):
    model, batch = model_and_batch(make_backbone, name)
    assert_loss_and_gradients_are_those_of_whole_logits(model, batch, smoothing)


@pytest.mark.parametrize("name", ["llama", "t5-tied"])
def test_sum_is_mean_times_label_tokens(make_backbone, name):
    model, batch = model_and_batch(make_backbone, name)
    labels = batch["labels"] if model.is_encoder_decoder else batch["labels"][:, 1:]
    count = (labels != IGNORE_INDEX).sum()
    assert_equal_up_to_rounding(model(**batch, reduction="sum").loss, model(**batch).loss * count)


@pytest.mark.parametrize("name", ["llama", "t5-tied"])
def test_the_summed_loss_does_not_depend_on_the_split_of_the_batch(make_backbone, name):
    model, batch = model_and_batch(make_backbone, name)
    rows = [model(**{key: value[i : i + 1] for key, value in batch.items()}, reduction="sum").loss for i in range(2)]
    assert_equal_up_to_rounding(sum(rows), model(**batch, reduction="sum").loss)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-tied"])
def test_left_padding_does_not_change_the_loss(make_backbone, name):
    model, batch = model_and_batch(make_backbone, name)
    expected = model(**batch).loss
    for key, value in (("input_ids", PAD), ("attention_mask", 0), ("labels", IGNORE_INDEX)):
        if key != "labels" or not model.is_encoder_decoder:
            batch[key] = F.pad(batch[key], (4, 0), value=value)
    assert_equal_up_to_rounding(model(**batch).loss, expected)


def test_the_prompt_predicts_the_first_token_if_it_has_a_label(make_backbone):
    model, batch = model_and_batch(make_backbone, "llama")
    logits = model(batch["input_ids"]).logits[:, model.num_virtual_tokens - 1]
    labels = torch.full_like(batch["labels"], IGNORE_INDEX)
    labels[:, 0] = batch["input_ids"][:, 0]
    assert_equal_up_to_rounding(model(batch["input_ids"], labels=labels).loss, F.cross_entropy(logits, labels[:, 0]))


@pytest.mark.parametrize("name", ["llama", "t5-tied"])
def test_a_batch_without_labels_has_zero_loss_and_gradients(make_backbone, name):
    model, batch = model_and_batch(make_backbone, name)
    batch["labels"].fill_(IGNORE_INDEX)
    for reduction in ("sum", "mean"):
        loss = model(**batch, reduction=reduction).loss
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in gradients(loss, *model.trainable_parameters().values()))


BEHIND_THE_HEAD = {
    "scale of Cohere": lambda: CohereForCausalLM(llama_config(CohereConfig, logit_scale=0.0625)),
    "scale of Granite": lambda: GraniteForCausalLM(llama_config(GraniteConfig, logits_scaling=8.0)),
    "cap of Gemma 2": lambda: Gemma2ForCausalLM(llama_config(Gemma2Config, head_dim=8, final_logit_softcapping=2.0)),
    "bias of BART": bart,
}


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("build", BEHIND_THE_HEAD.values(), ids=BEHIND_THE_HEAD)
def test_what_a_backbone_does_to_its_logits_is_in_the_loss(build, smoothing):
    model, batch = model_and_batch(lambda _: build(), "")
    assert_loss_and_gradients_are_those_of_whole_logits(model, batch, smoothing)


def test_a_buffer_behind_the_head_counts_with_the_values_that_it_has_in_the_end():
    model, batch = model_and_batch(lambda _: bart(), "")
    before = model(**batch).loss
    model.backbone.final_logits_bias = 3 * torch.randn(1, VOCABULARY)
    assert_equal_up_to_rounding(model(**batch).loss, loss_by_whole_logits(model, batch))
    assert model(**batch).loss != before


class Normalising(LlamaForCausalLM):
    """Does to its logits what is more than logits in, logits out."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits - output.logits.numpy(force=True).mean()
        output.logits = torch.cat([output.logits, output.logits], -1)
        return output


def test_a_backbone_that_does_more_to_its_logits_is_refused():
    model = get_adept_model(Normalising(llama_config()), AdeptConfig())
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(UserError, match="does something to its logits behind the LM head"):
        model(ids, labels=ids)


def test_a_head_that_reads_several_states_a_token_is_refused():
    sizes = {
        "hidden_size": 32,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    }
    config = ProphetNetConfig(
        vocab_size=VOCABULARY, num_encoder_attention_heads=4, num_decoder_attention_heads=4, **sizes
    )
    model = get_adept_model(ProphetNetForConditionalGeneration(config), AdeptConfig())
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(UserError, match="not one for each of the"):
        model(ids, labels=ids)

"""Predicted bytes of a step against those of a real one on the CPU, counted by hooks and by the allocator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, LEDConfig, LlamaConfig, MixtralConfig, PreTrainedConfig, T5Config

from adept_ds.backbone.quantization import Scheme, quantize_linears
from adept_ds.config.run import RunConfig
from adept_ds.errors import UserError
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.model.loss import IGNORE_INDEX
from adept_ds.planner import meta_step
from adept_ds.planner.meta_step import StepShape, StepTrace, meta_model, trace_step

SHAPE = StepShape(micro_batch_size=3, input_length=120, label_length=40)
VOCABULARY = 3_000


def llama(**changes: Any) -> PreTrainedConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return LlamaConfig(**{**sizes, **heads, **changes})


def mixtral() -> PreTrainedConfig:
    return MixtralConfig(**llama().to_diff_dict() | {"model_type": "mixtral", "num_local_experts": 4})


def gpt2() -> PreTrainedConfig:
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=4, n_head=4, n_positions=256, **dropout)


def t5(**changes: Any) -> PreTrainedConfig:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 3, "num_heads": 4, "vocab_size": VOCABULARY}
    return T5Config(**{**sizes, "dropout_rate": 0.0, "decoder_start_token_id": 0, **changes})


def run_of(**sections: Any) -> RunConfig:
    train = {"max_steps": 9, "warmup_steps": 0, **sections.pop("train", {})}
    model = {"name_or_path": "random", "dtype": "fp32", **sections.pop("model", {})}
    return RunConfig.model_validate({"model": model, "train": train, **sections})


def real_model(run: RunConfig, architecture: PreTrainedConfig) -> AdaptedModel:
    """The model of `meta_model` with random values."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto: Any = AutoModelForSeq2SeqLM if architecture.is_encoder_decoder else AutoModelForCausalLM
    backbone = auto.from_config(architecture, attn_implementation=run.model.attn_implementation)
    scheme = Scheme.of(run.model)
    if scheme:
        weights = {name: parameter.data for name, parameter in backbone.named_parameters()}
        for name, layer in quantize_linears(backbone, scheme).items():
            layer.weight.data = layer.storage_of(weights[name], torch.device("cpu"))
    model = get_adept_model(backbone, run.method.model_copy(update={"prompt_init": "normal"})).train()
    if run.train.activation_checkpointing:
        model.checkpoint_activations()
    return model


def real_loss(model: AdaptedModel, shape: StepShape = SHAPE) -> Tensor:
    """A batch of the traced shape, one row padded."""
    if shape.is_packed:
        return packed_loss(model, shape)
    ids = torch.randint(5, 90, (shape.micro_batch_size, shape.input_length - model.num_virtual_tokens))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids[:, : shape.label_length].clone()
    if not model.is_encoder_decoder:
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[:, -shape.label_length :] = 7
    return model(ids, mask, labels=labels, reduction="sum").loss


def packed_loss(model: AdaptedModel, shape: StepShape) -> Tensor:
    """Rows of two examples."""
    prompt, half = model.num_virtual_tokens, shape.input_length // 2
    ids = torch.randint(5, 90, (shape.micro_batch_size, shape.input_length))
    places = torch.arange(shape.input_length)
    example_ids = (1 + places // half).expand_as(ids)
    mask = (places % half >= prompt).long().expand_as(ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for end in (half, shape.input_length):
        labels[:, end - shape.label_length // 2 : end] = 7
    inputs = {"example_ids": example_ids, "task_ids": ids.new_zeros(len(ids), shape.input_length // (prompt + 1))}
    return model(ids, mask, labels=labels, reduction="sum", **inputs).loss


def measured_peak(model: AdaptedModel, shape: StepShape = SHAPE) -> int:
    """Most bytes that the allocator had handed out in one forward and backward pass."""
    for warm_up in (True, False):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            real_loss(model, shape).backward()
        for parameter in model.parameters():
            parameter.grad = None
        if not warm_up:
            alive = peak = 0
            for event in profiler.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    alive += event.nbytes()
                    peak = max(peak, alive)
    return peak


@contextmanager
def saved_bytes(model: AdaptedModel) -> Iterator[dict[int, int]]:
    """Storage to bytes of all that autograd saves inside the block, parameters and buffers aside."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.append(tensor)  # so that no address is used twice
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def predict(run: RunConfig, architecture: PreTrainedConfig, shape: StepShape = SHAPE) -> StepTrace:
    return trace_step(meta_model(run, architecture), shape, "cpu")


RUNS = {
    "llama": (run_of(), llama()),
    "llama, tied": (run_of(), llama(tie_word_embeddings=True)),
    "llama, eager attention": (run_of(model={"attn_implementation": "eager"}), llama()),
    "llama, nf4": (run_of(model={"quantization": "nf4"}), llama()),
    "llama, checkpointed": (run_of(train={"activation_checkpointing": True}), llama()),
    "llama, nf4, checkpointed": (
        run_of(model={"quantization": "nf4"}, train={"activation_checkpointing": True}),
        llama(),
    ),
    "llama, nf4, checkpointed, kept": (
        run_of(model={"quantization": "nf4", "keep_expanded": True}, train={"activation_checkpointing": True}),
        llama(),
    ),
    "t5, nf4, checkpointed, kept": (
        run_of(model={"quantization": "nf4", "keep_expanded": True}, train={"activation_checkpointing": True}),
        t5(),
    ),
    "experts": (run_of(), mixtral()),
    "experts, nf4": (run_of(model={"quantization": "nf4"}), mixtral()),
    "conv1d, nf4": (run_of(model={"quantization": "nf4"}), gpt2()),
    "t5": (run_of(), t5()),
    "t5, dropout": (run_of(), t5(dropout_rate=0.1)),
    "t5, int8": (run_of(model={"quantization": "int8"}), t5()),
    "llama, fp8": (run_of(model={"quantization": "fp8"}), llama()),
    "conv1d, fp8": (run_of(model={"quantization": "fp8"}), gpt2()),
    "t5, checkpointed": (run_of(train={"activation_checkpointing": True}), t5()),
}


@pytest.mark.parametrize("name", RUNS)
def test_peak_of_a_real_step(name):
    run, architecture = RUNS[name]
    assert predict(run, architecture).peak_bytes == pytest.approx(measured_peak(real_model(run, architecture)), rel=0.1)


@pytest.mark.parametrize("name", [name for name in RUNS if "checkpointed" not in name])
def test_bytes_saved_for_the_backward_pass(name):
    run, architecture = RUNS[name]
    model = real_model(run, architecture)
    with saved_bytes(model) as saved:
        loss = real_loss(model)
    assert loss.requires_grad
    assert predict(run, architecture).held_bytes == pytest.approx(sum(saved.values()), rel=0.1)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_label_smoothing_takes_no_memory(name):
    run, architecture = RUNS[name]
    smoothed, real = meta_model(run, architecture), real_model(run, architecture)
    for model in (smoothed, real):
        model.forward = partial(model.forward, label_smoothing=0.1)
    trace = trace_step(smoothed, SHAPE, "cpu")
    assert trace == predict(run, architecture)
    assert trace.peak_bytes == pytest.approx(measured_peak(real), rel=0.1)


PACKED = StepShape(micro_batch_size=2, input_length=240, label_length=80, is_packed=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_bytes_of_packed_rows(attention, is_checkpointed):
    run = run_of(
        model={"attn_implementation": attention},
        train={"packing": 600, "activation_checkpointing": is_checkpointed},
    )
    model, predicted = real_model(run, llama()), predict(run, llama(), PACKED)
    assert predicted.peak_bytes == pytest.approx(measured_peak(model, PACKED), rel=0.1)
    if not is_checkpointed:
        with saved_bytes(model) as saved:
            loss = real_loss(model, PACKED)
        assert loss.requires_grad
        assert predicted.held_bytes == pytest.approx(sum(saved.values()), rel=0.1)


def test_checkpointing_keeps_little_more_than_the_layers_inputs():
    held = predict(*RUNS["llama, checkpointed"]).held_bytes
    inputs = 4 * SHAPE.micro_batch_size * SHAPE.input_length * 64 * 4
    assert inputs < held < 3 * inputs


def test_bytes_are_linear_in_layers():
    held = [predict(run_of(), llama(num_hidden_layers=layers)).held_bytes for layers in (2, 4, 6)]
    assert held[2] - held[1] == held[1] - held[0]


def test_fused_attention_keeps_no_scores():
    growth = [
        [predict(run_of(model={"attn_implementation": name}), llama(), shape).held_bytes for shape in shapes]
        for name in ("sdpa", "eager")
        for shapes in [(StepShape(1, 100, 8), StepShape(1, 200, 8))]
    ]
    (fused, fused_twice), (eager, eager_twice) = growth
    assert fused_twice < 2.1 * fused
    assert eager_twice > 2.5 * eager


def test_a_dequantised_weight_is_counted_while_it_is_there():
    trace = predict(*RUNS["llama, nf4"])
    assert trace.dequantized_bytes == 160 * 64 * 4
    assert predict(*RUNS["llama"]).dequantized_bytes == 0


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_kept_expansion_is_made_twice_a_step_and_gone_after_it(family: str, monkeypatch):
    losses, made = [], []
    own = Scheme.expand

    def counted(self: Scheme, *args: Any) -> Tensor:
        made[-1] += 1
        return own(self, *args)

    monkeypatch.setattr(Scheme, "expand", counted)
    for keeps in (False, True):
        run, architecture = RUNS[f"{family}, nf4, checkpointed, kept"]
        run = run.model_copy(update={"model": run.model.model_copy(update={"keep_expanded": keeps})})
        torch.manual_seed(3)
        model = real_model(run, architecture)
        made.append(0)
        torch.manual_seed(4)
        loss = real_loss(model)
        loss.backward()
        gradients = [parameter.grad for parameter in model.trainable_parameters().values()]
        losses.append([loss.detach(), *gradients])
        assert all(getattr(module, "_expanded", None) is None for module in model.modules())
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    assert made[1] < 0.8 * made[0]
    # One decoder layer's weights stay in full where there was one weight; of T5, those of a decoder layer.
    plain, kept = (
        predict(RUNS[name][0], RUNS[name][1]) for name in ("llama, nf4, checkpointed", "llama, nf4, checkpointed, kept")
    )
    assert plain.dequantized_bytes == 160 * 64 * 4
    assert kept.dequantized_bytes <= (3 * 160 * 64 + 2 * 64 * 64 + 2 * 64 * 32) * 4
    assert kept.dequantized_bytes > 3 * plain.dequantized_bytes


def test_a_gpu_copies_an_fp8_weight_in_8_bits_and_a_cpu_widens_it():
    run, architecture = run_of(model={"quantization": "fp8", "dtype": "bf16"}), llama()
    model = meta_model(run, architecture)
    assert trace_step(model, SHAPE, "cuda").dequantized_bytes == 160 * 64
    assert trace_step(model, SHAPE, "cpu").dequantized_bytes == 160 * 64 * 4


def test_logits_are_those_of_a_chunk():
    few, many = (predict(run_of(), llama(), StepShape(1, 120, labels)).logits_bytes for labels in (20, 40))
    assert few > 20 * VOCABULARY * 4
    assert many == pytest.approx(2 * few, rel=0.05)


def test_a_real_70b_shape_from_its_config_alone(tmp_path: Path):
    shape = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    shape |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    from adept_ds.backbone.load import load_architecture

    run = run_of(model={"name_or_path": str(tmp_path), "dtype": "bf16"}, train={"activation_checkpointing": True})
    trace = trace_step(meta_model(run, load_architecture(run.model)), StepShape(1, 512, 128))
    inputs = 80 * 512 * 8192 * 2
    assert inputs < trace.held_bytes < 1.5 * inputs


def test_a_backbone_that_asks_for_values_cannot_be_planned_and_says_so() -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    led = LEDConfig(vocab_size=99, d_model=32, attention_window=[4], encoder_ffn_dim=48, decoder_ffn_dim=48, **sizes)
    with pytest.raises(UserError, match=r"LEDForConditionalGeneration cannot be gone through without its weights"):
        predict(run_of(), led)


@pytest.mark.parametrize(
    ("architecture", "attention"), [(llama(), "eager"), (t5(dropout_rate=0.1), "sdpa"), (mixtral(), "sdpa")]
)
def test_a_step_whose_operations_are_remembered_is_the_same(
    architecture: PreTrainedConfig, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = meta_model(run_of(model={"attn_implementation": attention}), architecture)
    monkeypatch.setattr(meta_step, "_MADE", {})
    with monkeypatch.context() as patch:
        patch.setattr(meta_step, "_makes_tensors", lambda func: False)
        computed = trace_step(model, SHAPE)
    assert not meta_step._MADE
    assert [trace_step(model, SHAPE) for _ in range(2)] == [computed] * 2
    assert meta_step._MADE

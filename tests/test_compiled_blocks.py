"""Compiled blocks compute what blocks compute, in one piece, and are compiled once for all lengths."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from adept_ds.backbone import compiled_blocks
from adept_ds.backbone.blocks import backbone_layers
from adept_ds.backbone.quantization import Scheme, quantize_linears
from adept_ds.config.method import AdeptConfig, LoraConfig, MethodConfig
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.model.loss import IGNORE_INDEX
from tests.models import BACKBONES, VOCABULARY, causal, seeded, t5_config, talkative_t5
from tests.ranks import REPOSITORY

GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": BACKBONES["llama"],
    "t5": BACKBONES["t5-untied"],
    "t5-dropout": lambda: talkative_t5(t5_config(initializer_factor=2.0, dropout_rate=0.1)),
    "gpt-neox": causal("gpt_neox", rotary_pct=0.5),
    "qwen3": causal("qwen3", **GROUPED),
    "gemma2": causal("gemma2", **GROUPED, sliding_window=8),  # caps its logits behind the head
}
ADEPT = AdeptConfig(num_virtual_tokens=3, bottleneck=2)
LORA = LoraConfig(rank=2, dropout=0.3)
LENGTHS = (12, 17, 9, 30, 31, 8, 21, 14, 40, 33)


@pytest.fixture(autouse=True)
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and their gradients are traced into graphs, which are then interpreted: what takes long is left out."""
    monkeypatch.setattr(compiled_blocks, "COMPILER", {"backend": "aot_eager"})


def adapted(
    family: str,
    method: MethodConfig = ADEPT,
    dtype: torch.dtype = torch.float32,
    scheme: Scheme | None = None,
    checkpointing: bool = False,
) -> AdaptedModel:
    """A model in training, the same at every call."""
    backbone = seeded(FAMILIES[family]).to(dtype).requires_grad_(False)
    if scheme:
        weights = {name: parameter.detach().clone() for name, parameter in backbone.named_parameters()}
        for name, layer in quantize_linears(backbone, scheme).items():
            layer.weight.data = layer.storage_of(weights[name], torch.device("cpu"))
    model = get_adept_model(backbone, method).train()
    for parameter in model.trainable_parameters().values():
        parameter.data = parameter.data.to(dtype)
    if checkpointing:
        model.checkpoint_activations()
    return model


def step(model: AdaptedModel, length: int = 12) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a padded batch; dropout draws the same at every call."""
    ids = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    torch.manual_seed(0)
    loss = model(ids, mask, labels=ids.masked_fill(mask == 0, IGNORE_INDEX), reduction="sum").loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.trainable_parameters().items()}
    for parameter in model.parameters():
        parameter.grad = None
    return loss.detach(), gradients


def assert_same_step(actual: Any, expected: Any, loss: float = 1e-6, gradients: float = 1e-3) -> None:
    """Up to these distances: of the loss, and of gradients as a part of their largest element."""
    assert float(actual[0]) == pytest.approx(float(expected[0]), rel=loss)
    for name, gradient in expected[1].items():
        largest = float((actual[1][name] - gradient).abs().max())
        assert largest <= gradients * float(gradient.abs().max()), name


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize(
    ("family", "method", "graphs"),
    [
        ("llama", ADEPT, 1),
        # Nothing that the first block reads wants a gradient.
        ("llama", LORA, 2),
        # The first block of encoder and decoder makes the bias of positions for the others.
        ("t5", ADEPT, 4),
        ("gpt-neox", ADEPT, 1),
        ("qwen3", ADEPT, 1),
        ("gemma2", ADEPT, 1),
    ],
    ids=["llama", "llama-lora", "t5", "gpt-neox", "qwen3", "gemma2"],
)
def test_a_block_is_one_graph_for_all_layers_and_lengths(family: str, method: MethodConfig, graphs: int) -> None:
    plain, model = adapted(family, method), adapted(family, method)
    said: list[str] = []
    model.compile_blocks(said.append)
    for length in LENGTHS:
        assert_same_step(step(model, length), step(plain, length))
        # All are there after the first batch: no length after it is compiled for.
        assert counters["stats"]["unique_graphs"] == len(said) == graphs
    assert not counters["graph_break"]
    assert all("compiled" in line and line.endswith(" s") for line in said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"checkpointing": True}),
        ("t5-dropout", {}),
        ("llama", {"dtype": torch.bfloat16, "scheme": Scheme("nf4", double=True)}),
    ],
    ids=["llama-checkpointed", "t5-dropout", "llama-nf4-bf16"],
)
def test_compiled_blocks_are_the_same_but_for_rounding(family: str, settings: dict[str, Any]) -> None:
    plain, model = adapted(family, **settings), adapted(family, **settings)
    model.compile_blocks()
    actual, expected = step(model), step(plain)
    assert counters["stats"]["unique_graphs"]
    # A compiler keeps in fp32 what is rounded to bf16 between two functions.
    assert_same_step(actual, expected, **({"loss": 2e-3, "gradients": 0.2} if "dtype" in settings else {}))


@pytest.mark.usefixtures("traced_only")
def test_bf16_blocks_are_traced_too() -> None:
    """What the CPU multiplies quickly in bf16 is asked for on the way."""
    plain, model = adapted("llama", dtype=torch.bfloat16), adapted("llama", dtype=torch.bfloat16)
    model.compile_blocks()
    assert_same_step(step(model), step(plain), loss=2e-3, gradients=0.2)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("traced_only")
def test_a_compiled_quantised_block_keeps_no_expanded_weight() -> None:
    model = adapted("llama", scheme=Scheme("nf4"))
    expanded = {(layer.out_features, layer.in_features) for layer in model.modules() if hasattr(layer, "scheme")}
    model.compile_blocks()
    shapes: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step(model)
    assert counters["stats"]["unique_graphs"] == 1
    assert shapes
    assert not expanded.intersection(shapes)


@pytest.mark.usefixtures("traced_only")
def test_evaluation_and_generation_are_not_compiled() -> None:
    plain, model = adapted("llama"), adapted("llama")
    model.compile_blocks()
    step(model)
    counters.clear()
    ids = torch.randint(3, VOCABULARY, (2, 6))
    texts = [one.eval().generate(ids, max_new_tokens=5, do_sample=False) for one in (plain, model)]
    assert torch.equal(*texts)
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert not counters["stats"]


def test_blocks_with_hooks_inside_run_as_they_are() -> None:
    """As those that DeepSpeed puts on every module at ZeRO stage 3."""
    plain, model = adapted("llama"), adapted("llama")
    said: list[str] = []
    model.compile_blocks(said.append)
    for block in backbone_layers(model.backbone):
        block.mlp.register_forward_hook(lambda *_: None)
    assert_same_step(step(model), step(plain))
    assert said == [
        "train.compile: modules within LlamaDecoderLayer have hooks, with which it cannot be compiled (at ZeRO stage 3 "
        "DeepSpeed gathers their weights so); the run goes on without it"
    ]
    assert not counters["stats"]


class DependsOnValues(torch.nn.Module):
    """SiLU, but for one sum of its input, which a compiler cannot know."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) == 0.5 else torch.nn.functional.silu(x)


@pytest.mark.usefixtures("traced_only")
def test_a_block_that_cannot_be_traced_runs_as_it_is() -> None:
    plain, model = adapted("llama", checkpointing=True), adapted("llama", checkpointing=True)
    said: list[str] = []
    model.compile_blocks(said.append)
    backbone_layers(model.backbone)[1].mlp.act_fn = DependsOnValues()
    assert_same_step(step(model), step(plain))
    assert len([line for line in said if "LlamaDecoderLayer cannot be compiled here" in line]) == 1
    counters.clear()
    assert_same_step(step(model), step(plain))
    assert not counters["stats"]


WITHOUT_COMPILER = """
from tests.test_compiled_blocks import adapted, assert_same_step, step

plain, model = adapted("llama"), adapted("llama")
model.compile_blocks(print)
assert_same_step(step(model), step(plain))
"""


@pytest.mark.slow
def test_without_a_compiler_the_run_goes_on_and_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("train.compile")]
    assert len(said) == 1
    assert "cannot be compiled here: " in said[0]
    assert "compiler" in said[0]
    assert said[0].endswith("; the run goes on without it")

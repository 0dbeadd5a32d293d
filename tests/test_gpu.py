"""What only a CUDA device can show: placement, NCCL, CUDA's generators in checkpoints, kernels, allocator peaks."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast, T5Config

from adept_ds.backbone import fp8
from adept_ds.backbone.load import random_backbone
from adept_ds.backbone.quantization import Fp8Linear, QuantizedLinear, Scheme
from adept_ds.config.method import AdeptConfig
from adept_ds.config.run import DataConfig, GenerationConfig, RunConfig
from adept_ds.data.problems import load_problems
from adept_ds.distributed import World
from adept_ds.evaluation.generate import generate_samples
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.model.loss import IGNORE_INDEX
from adept_ds.planner.memory import Cluster, MemoryModel

from .models import llama_config, save, seeded
from .ranks import REPOSITORY, free_port

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights and a tokenizer of single characters."""
    model = seeded(lambda: LlamaForCausalLM(llama_config(hidden_size=64, intermediate_size=128)))
    return save(model, tokenizer, tmp_path_factory.mktemp("llama"))


def train(backbone: Path, run_dir: Path, environment: dict[str, str] | None = None, **sections: Any) -> list[float]:
    """Train for eight steps by the real launcher on one rank; return the losses by step."""
    values: dict[str, Any] = {
        "model": {"name_or_path": str(backbone), "dtype": "bf16"},
        "method": {"name": "adept", "num_virtual_tokens": 5, "bottleneck": 2},
        "train": {
            "max_steps": 8,
            "warmup_steps": 1,
            "global_batch_size": 4,
            "save_every": 4,
            "keep_checkpoints": 9,
            "learning_rate": {"soft_prompt": 0.03, "network": 0.01, "adapter": 0.01},
        },
        "eval": {"every_steps": 8, "max_examples": 4},
        "logging": {"run_dir": str(run_dir), "every_steps": 1, "trackers": []},
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    }
    for name, changes in sections.items():
        values[name] = changes if name == "method" else {**values[name], **changes}
    config = run_dir.with_suffix(".json")
    config.write_text(json.dumps(values))
    launcher = ["deepspeed", "--num_gpus", "1", "--master_port", str(free_port())]
    command = [*launcher, "launchers/train.py", "--config", str(config), "--resume", "auto"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "PATH": path, **(environment or {})}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_fp32_losses_are_those_of_the_cpu(model_folder: Path, tmp_path: Path) -> None:
    settings = {"model": {"dtype": "fp32"}}
    on_gpu = train(model_folder, tmp_path / "gpu", **settings)
    on_cpu = train(model_folder, tmp_path / "cpu", {"DS_ACCELERATOR": "cpu"}, **settings)
    assert on_gpu[-1] < on_gpu[0]
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "quantization", "stage"),
    [
        # Dropout draws from CUDA's generator.
        ({"name": "lora", "rank": 4, "dropout": 0.3}, None, 1),
        ({"name": "adept", "num_virtual_tokens": 5, "bottleneck": 3, "dropout": 0.3}, "nf4", 3),
    ],
    ids=["lora", "adept-nf4-zero3"],
)
def test_a_resumed_run_repeats_the_losses_to_the_bit(
    method: dict[str, Any], quantization: str | None, stage: int, model_folder: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "method": method,
        "model": {"quantization": quantization},
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }
    run_dir = tmp_path / "run"
    whole = train(model_folder, run_dir, **settings)
    (run_dir / "status.json").unlink()
    for checkpoint in (run_dir / "checkpoints").glob("step-00000008"):
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    assert train(model_folder, run_dir, **settings) == whole


@pytest.mark.usefixtures("world")
def test_samples_are_those_of_the_cpu(model_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = get_adept_model(LlamaForCausalLM.from_pretrained(model_folder), AdeptConfig(num_virtual_tokens=5)).eval()
    problems, data = load_problems(DataConfig(), "test")[:6], DataConfig()
    decoding = GenerationConfig(max_new_tokens=40, num_samples=2, batch_size=5)
    samples = [
        generate_samples(model.to(device), tokenizer, problems, decoding, data, World(0, 1, 0, device))
        for device in (torch.device("cpu"), CUDA)
    ]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nf4_is_that_of_bitsandbytes_to_the_bit(double: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(2048, 2100, dtype=dtype, device=CUDA).requires_grad_(False)
    scheme = Scheme("nf4", double)
    layer = QuantizedLinear(linear, scheme)
    layer.weight.copy_(scheme.quantize(linear.weight, CUDA, dtype))
    theirs = bnb.nn.Params4bit(linear.weight.data, False, compress_statistics=double, quant_type="nf4").to(CUDA)
    assert torch.equal(layer.dense_weight(), bnb_functional.dequantize_4bit(theirs.data, theirs.quant_state))


@pytest.mark.parametrize("rows", [1, 40, 2000])
@pytest.mark.parametrize("double", [False, True])
def test_nf4_products_are_those_of_bitsandbytes_to_the_bit(double: bool, rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(2048, 2112, bias=False, dtype=torch.bfloat16, device=CUDA).requires_grad_(False)
    scheme = Scheme("nf4", double)
    ours = QuantizedLinear(linear, scheme)
    ours.weight.copy_(scheme.quantize(linear.weight, CUDA, torch.bfloat16))
    theirs = bnb.nn.Linear4bit(
        2048, 2112, bias=False, compute_dtype=torch.bfloat16, compress_statistics=double, quant_type="nf4"
    )
    data = linear.weight.data.cpu()
    theirs.weight = bnb.nn.Params4bit(data, False, compress_statistics=double, quant_type="nf4")
    results = []
    for layer in (ours, theirs.to(CUDA)):
        torch.manual_seed(1)
        x = torch.randn(rows, 2048, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
        y = layer(x)
        y.backward(torch.randn_like(y))
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_fp8_products_of_the_card_are_the_emulated_ones(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fp8.multiplies_fp8(CUDA):
        pytest.skip("this card does not multiply 8-bit floats")
    torch.manual_seed(0)
    linear = nn.Linear(1024, 2816, bias=bias, dtype=torch.bfloat16, device=CUDA).requires_grad_(False)
    layer = Fp8Linear(linear, Scheme("fp8"))
    layer.weight.copy_(layer.storage_of(linear.weight, CUDA))
    on_cpu = copy.deepcopy(layer).to("cpu")
    x = torch.randn(rows, 1024, dtype=torch.bfloat16) * torch.logspace(-2, 2, 1024).bfloat16()
    grad = torch.randn(rows, 2816, dtype=torch.bfloat16)
    for own, emulated in [
        (layer.product(x.to(CUDA)), on_cpu.product(x)),
        (layer.input_gradient(grad.to(CUDA)), on_cpu.input_gradient(grad)),
    ]:
        # The same 8-bit values; the order of the sum in fp32 may turn the one rounding to bf16.
        assert float((own.cpu() - emulated).float().norm() / emulated.float().norm()) < 5e-3
        torch.testing.assert_close(own.cpu(), emulated, rtol=2**-6, atol=2**-7 * float(emulated.abs().max()))


LLAMA = LlamaConfig(
    vocab_size=32_000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
)
T5 = T5Config(
    vocab_size=32_128,
    d_model=1024,
    d_kv=64,
    d_ff=2816,
    num_layers=6,
    num_heads=16,
    dropout_rate=0.1,
    decoder_start_token_id=0,
)


def step_peak(model: AdaptedModel, batch: int, inputs: int, labels: int) -> int:
    """Growth of the allocator's bytes in one forward and backward pass, after a warm-up.

    One row is padded: without padding `transformers` makes no attention mask, which the planner allows for.
    """
    ids = torch.randint(5, 30_000, (batch, inputs - model.num_virtual_tokens), device=CUDA)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    targets = ids[:, :labels].clone()
    if not model.is_encoder_decoder:
        targets = torch.full_like(ids, IGNORE_INDEX)
        targets[:, -labels:] = 7
    growth = 0
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(ids, mask, labels=targets, reduction="sum").loss.backward()
        growth = torch.cuda.max_memory_allocated() - before
        for parameter in model.parameters():
            parameter.grad = None
    return growth


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("quantization", [None, "nf4", "fp8"])
@pytest.mark.parametrize("architecture", [LLAMA, T5], ids=["llama", "t5"])
def test_the_planned_peak_is_the_allocators(
    architecture: PreTrainedConfig, quantization: str | None, checkpointing: bool
) -> None:
    run = RunConfig.model_validate(
        {
            "model": {"name_or_path": "random", "dtype": "bf16", "quantization": quantization},
            "method": {"num_virtual_tokens": 8, "bottleneck": 2, "prompt_init": "normal"},
            "data": {"max_prompt_length": 384, "max_length": 512},
            "train": {
                "max_steps": 9,
                "warmup_steps": 0,
                "global_batch_size": 4,
                "activation_checkpointing": checkpointing,
            },
        }
    )
    planner = MemoryModel(run, architecture, Cluster(1, 1, 2**36))
    planned = planner.plan("replicate", with_largest=False).memory
    shape = planner.shape(4)
    before = torch.cuda.memory_allocated()
    model = get_adept_model(random_backbone(run.model, architecture, CUDA), run.method).train()
    if checkpointing:
        model.checkpoint_activations()
    weights = torch.cuda.memory_allocated() - before
    # The allocator leaves up to 1 MB unused behind each tensor.
    assert planned.backbone == pytest.approx(weights, rel=0.05)
    step = planned.activations + planned.logits + planned.dequantized
    assert step == pytest.approx(step_peak(model, 4, shape.input_length, shape.label_length), rel=0.1)

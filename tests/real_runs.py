"""Small real models on disk, and the real launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from adept_ds.config import DataConfig
from adept_ds.data import load_examples

REPOSITORY = Path(__file__).resolve().parent.parent
VOCABULARY = 400


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on the bundled problems."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    examples = load_examples(DataConfig(), "train")
    tokenizer.train_from_iterator([example.prompt + example.target for example in examples], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return save(LlamaForCausalLM(config), tiny_tokenizer, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_t5(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer T5 with random weights, its embedding tied three times as in the original checkpoints."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return save(T5ForConditionalGeneration(config), tiny_tokenizer, tmp_path_factory.mktemp("t5"))


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_settings(model: Path, run_dir: Path, **train: Any) -> dict[str, Any]:
    """Settings of a small fp32 run on ZeRO-3, every parameter really sharded."""
    return {
        "model": {"name_or_path": str(model), "dtype": "fp32"},
        "method": {"num_virtual_tokens": 5, "bottleneck": 2},
        "train": {
            "max_steps": 12,
            "warmup_steps": 2,
            "global_batch_size": 4,
            "learning_rate": {"soft_prompt": 0.03, "network": 0.01},
            "save_every": 5,
            "keep_checkpoints": 10,
            **train,
        },
        "eval": {"every_steps": 12},
        "logging": {"run_dir": str(run_dir), "every_steps": 1, "trackers": []},
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    }


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """CPU ranks, one thread each, with an extensions folder of their own."""
    return {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("extensions")),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


Start = Callable[..., subprocess.Popen]
Launch = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def start(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start an entry point on so many ranks of the real `deepspeed` launcher; on 0 ranks with plain python."""

    def start_ranks(ranks: int, script: str, settings: Any, *arguments: str) -> subprocess.Popen:
        config = tmp_path_factory.mktemp("config") / "run.json"
        config.write_text(json.dumps(settings))
        launcher = (
            ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())] if ranks else [sys.executable]
        )
        return subprocess.Popen(
            [*launcher, script, "--config", str(config), *arguments],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start_ranks


@pytest.fixture(scope="session")
def launch(start: Start) -> Launch:
    """As `start`, and wait for the end."""

    def launch_ranks(ranks: int, script: str, settings: Any, *arguments: str) -> subprocess.CompletedProcess:
        process = start(ranks, script, settings, *arguments)
        try:
            output, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    return launch_ranks


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def losses(run_dir: Path) -> list[float]:
    """Training losses of a run by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]

"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from adept_ds.distributed import World

pytest_plugins = ("tests.real_runs",)
REPOSITORY = Path(__file__).resolve().parent.parent

VOCABULARY = 99
PAD = 0
EOS = 1
WIDTH = 32
WORLD = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
"""This process alone; collective operations need the fixture `world` too."""


# Matrices of these sizes are slower on several threads, and tests run beside one another.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the real MBPP files and the T5 tokenizer; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("ADEPT_DS_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data folder at {folder} (set ADEPT_DS_SHARED)")
    return folder


def _llama() -> PreTrainedModel:
    """Rotary positions, grouped-query attention, untied head."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            pad_token_id=PAD,
            bos_token_id=2,
            eos_token_id=EOS,
        )
    )


def _gpt2() -> PreTrainedModel:
    """Absolute positions, tied head, `Conv1D` layers."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=2,
            n_head=4,
            n_positions=128,
            initializer_range=0.3,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            pad_token_id=PAD,
            bos_token_id=2,
            eos_token_id=EOS,
        )
    )


def _codegen() -> PreTrainedModel:
    """Linear layers and a head with biases."""
    model = CodeGenForCausalLM(
        CodeGenConfig(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=2,
            n_head=4,
            n_positions=128,
            rotary_dim=4,
            initializer_range=0.3,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            pad_token_id=PAD,
            bos_token_id=2,
            eos_token_id=EOS,
        )
    )
    nn.init.normal_(model.lm_head.bias)
    return model


def _t5(tied: bool) -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        initializer_factor=2.0,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    # T5Config takes from the argument only whether the head's input is scaled.
    config.tie_word_embeddings = tied
    model = T5ForConditionalGeneration(config)
    # Under a table as large as T5 draws it, random layers have little to say, and a tied head repeats its input.
    nn.init.normal_(model.shared.weight, std=0.3)
    return model


BACKBONES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "codegen": _codegen,
    "t5-tied": lambda: _t5(tied=True),
    "t5-untied": lambda: _t5(tied=False),
}


@pytest.fixture
def make_backbone() -> Callable[[str], PreTrainedModel]:
    """Build a small random model by name, in fp32 and evaluation mode; the same weights at every call."""

    def make(name: str) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return BACKBONES[name]().eval()

    return make


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character: ids 3 to 98, below them pad, end and start."""
    characters = [*map(chr, range(32, 127)), "\n"]
    vocabulary = {"<pad>": PAD, "</s>": EOS, "<s>": 2, **{c: 3 + i for i, c in enumerate(characters)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


@pytest.fixture
def world() -> Iterator[World]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield WORLD
    dist.destroy_process_group()

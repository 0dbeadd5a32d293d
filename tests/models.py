"""Small random models of one shape, and the tokenizers that go with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
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

PAD, EOS, START = 0, 1, 2
VOCABULARY = 99
"""Of the tokenizer by characters."""
WIDTH = 32
TOKENS = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": EOS}


def llama_config(config_class: type = LlamaConfig, **changes: Any) -> Any:
    """Rotary positions, grouped-query attention, untied head; of any class that names its sizes as Llama does."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }
    return config_class(**shape | TOKENS | changes)


def t5_config(**changes: Any) -> T5Config:
    """Without dropout; its embedding tied three times as in the original checkpoints."""
    shape = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    tokens = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    return T5Config(**shape | tokens | {"dropout_rate": 0.0} | changes)


def causal(model_type: str, **changes: Any) -> Callable[[], PreTrainedModel]:
    """Return what builds a causal model of any type that takes the usual names of sizes."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    parts = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "attention_dropout")
    settings = {"vocab_size": VOCABULARY, "initializer_range": 0.3} | sizes | dict.fromkeys(parts, 0.0) | TOKENS
    return lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings | changes))


def _gpt_config(config_class: type, **changes: Any) -> Any:
    """Of a class that names its sizes as GPT-2 does; absolute positions."""
    shape = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 128}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return config_class(**shape | dropout | TOKENS | {"initializer_range": 0.3} | changes)


def _codegen() -> PreTrainedModel:
    """Linear layers and a head with biases."""
    model = CodeGenForCausalLM(_gpt_config(CodeGenConfig, rotary_dim=4))
    nn.init.normal_(model.lm_head.bias)
    return model


def talkative_t5(config: T5Config) -> PreTrainedModel:
    """A T5 that says something else to every input; the config's initializer factor should be about 2."""
    model = T5ForConditionalGeneration(config)
    # Under a table as large as T5 draws it, random layers have little to say, and a tied head repeats its input.
    nn.init.normal_(model.shared.weight, std=0.3)
    return model


def _t5(tied: bool) -> PreTrainedModel:
    config = t5_config(initializer_factor=2.0, tie_word_embeddings=tied)
    # T5Config takes from the argument only whether the head's input is scaled.
    config.tie_word_embeddings = tied
    return talkative_t5(config)


BACKBONES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(llama_config(initializer_range=0.3)),
    "gpt2": lambda: GPT2LMHeadModel(_gpt_config(GPT2Config)),  # tied head, `Conv1D` layers
    "codegen": _codegen,
    "t5-tied": lambda: _t5(tied=True),
    "t5-untied": lambda: _t5(tied=False),
}


def seeded(build: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """What `build` makes, in fp32 and evaluation mode; the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character: ids 3 to 98, below them pad, end and start."""
    characters = [*map(chr, range(32, 127)), "\n"]
    vocabulary = {"<pad>": PAD, "</s>": EOS, "<s>": START, **{c: 3 + i for i, c in enumerate(characters)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return _tokenizer(core)


def byte_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on the texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(texts, trainer)
    return _tokenizer(core, clean_up_tokenization_spaces=False)


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece's of Llama 2 and Mistral: a space stands in front of a text, a run of spaces is one token."""
    vocabulary = {"<unk>": 0, "</s>": EOS, "<s>": START, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    spaces = [2**power * "\u2581" for power in range(4)]
    for token in [*spaces, *map(chr, range(33, 127))]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = list(zip(spaces[:-1], spaces[:-1], strict=True))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    space_again, first_off = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([space_again, decoders.ByteFallback(), decoders.Fuse(), first_off])
    names = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, clean_up_tokenization_spaces=False)


def _tokenizer(core: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, **options)

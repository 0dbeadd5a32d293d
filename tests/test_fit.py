"""Tokenizer, data and backbone that do not fit each other."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from transformers import BartConfig, BloomConfig, GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig, T5Config

from adept_ds.config.method import PrefixTuningConfig, PromptTuningConfig
from adept_ds.config.run import DataConfig
from adept_ds.data.encode import EncodedDataset, encode_prompts
from adept_ds.data.fit import check_examples, check_prompts, fit_padding, most_positions
from adept_ds.errors import UserError
from adept_ds.formats import Example, TokenLimits
from tests.models import EOS, PAD, VOCABULARY, byte_tokenizer, character_tokenizer

PROMPT = PromptTuningConfig(num_virtual_tokens=3)
CFG = DataConfig(max_prompt_length=90, max_length=100)


def gpt2(positions: int = 64, rows: int = VOCABULARY) -> PreTrainedConfig:
    return GPT2Config(vocab_size=rows, n_positions=positions)


def encoded(examples: Sequence[Example], cfg: DataConfig = CFG) -> EncodedDataset:
    return EncodedDataset(examples, character_tokenizer(), cfg, 3, False)


@pytest.mark.parametrize(
    ("architecture", "limit"),
    [
        (gpt2(), 64),
        (OPTConfig(max_position_embeddings=48), 48),
        (BartConfig(max_position_embeddings=32), 32),
        (LlamaConfig(max_position_embeddings=16), None),
        (T5Config(), None),
        (BloomConfig(), None),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_only_positions_with_a_row_each_are_limited(architecture: PreTrainedConfig, limit: int | None) -> None:
    assert most_positions(architecture) == limit


def test_an_example_longer_than_the_positions_is_refused_with_the_prompt_counted() -> None:
    data = encoded([Example("1", "x" * 40, "y" * 20)])
    check_examples(data, character_tokenizer(), gpt2(64), PROMPT, CFG)  # 40 + 20 + end token + 3
    with pytest.raises(
        UserError, match=r"64 tokens, 3 of them method.name pt's, .* 63 positions; expected data.max_le"
    ):
        check_examples(data, character_tokenizer(), gpt2(63), PROMPT, CFG)


def test_a_prefix_takes_positions_too() -> None:
    data, prefix = encoded([Example("1", "x" * 40, "y" * 20)]), PrefixTuningConfig(prefix_length=4)
    check_examples(data, character_tokenizer(), gpt2(65), prefix, CFG)
    with pytest.raises(UserError, match=r"65 tokens, 4 of them method.name prefix's, .* 64 positions"):
        check_examples(data, character_tokenizer(), gpt2(64), prefix, CFG)
    prompts = encode_prompts([Example("1", "x" * 40, "y")], character_tokenizer(), CFG, 0, False)
    with pytest.raises(UserError, match=r"max_new_tokens of at most 20 \(now 21\)"):
        check_prompts(prompts, character_tokenizer(), gpt2(64), prefix, 21)


def test_more_positions_than_were_trained_on_are_told_where_they_can_be_computed() -> None:
    data, tokenizer = encoded([Example("1", "x" * 40, "y" * 20)]), character_tokenizer()
    long, short = (LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=count) for count in (64, 63))
    assert check_examples(data, tokenizer, long, PROMPT, CFG) is None
    note = check_examples(data, tokenizer, short, PROMPT, CFG)
    assert note == "the longest example has 64 tokens, more than the 63 that the backbone was trained to read"


def test_prompts_must_leave_positions_to_go_on() -> None:
    prompts = encode_prompts([Example("1", "x" * 40, "y")], character_tokenizer(), CFG, 3, False)
    check_prompts(prompts, character_tokenizer(), gpt2(64), PROMPT, 21)
    with pytest.raises(UserError, match=r"expected eval.generation.max_new_tokens of at most 21 \(now 22\)"):
        check_prompts(prompts, character_tokenizer(), gpt2(64), PROMPT, 22)


def test_a_token_without_a_row_in_the_table_is_refused_by_name() -> None:
    tokenizer = character_tokenizer()
    highest = tokenizer.convert_tokens_to_ids("~")
    data = encoded([Example("1", "a~", "b")])
    check_examples(data, tokenizer, gpt2(rows=highest + 1), PROMPT, CFG)
    with pytest.raises(UserError, match=rf"the token '~' \(id {highest}\) .* has only {highest} rows"):
        check_examples(data, tokenizer, gpt2(rows=highest), PROMPT, CFG)


def test_padding_without_a_row_is_replaced_and_told() -> None:
    tokenizer = byte_tokenizer(["abc"], 300)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    rows = tokenizer.pad_token_id
    note = fit_padding(tokenizer, gpt2(rows=rows))
    assert tokenizer.pad_token_id == EOS
    assert note is not None
    assert "'[PAD]'" in note
    assert str(rows) in note
    assert fit_padding(tokenizer, gpt2(rows=rows)) is None


def test_a_tokenizer_without_end_pads_with_its_first_token() -> None:
    tokenizer = character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    assert fit_padding(tokenizer, gpt2()) is None
    assert tokenizer.pad_token_id == PAD


def test_prompts_that_are_cut_are_counted() -> None:
    examples = [Example("1", "x" * 95, "y"), Example("2", "x", "y")]
    prompts = encode_prompts(examples, character_tokenizer(), CFG, 3, False)
    assert [len(ids) for ids in prompts.ids] == [87, 1]
    assert prompts.note(CFG) == "truncated: 1 of 2 prompts are longer than data.max_prompt_length allows and were cut"
    assert encode_prompts(examples[1:], character_tokenizer(), CFG, 3, False).note(CFG) is None


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_a_source_has_at_most_so_many_tokens_however_few(limit: int) -> None:
    cfg = DataConfig(format="tasks", tasks=("rte",))
    examples = [Example("1", "abcdefgh", "x", limits=TokenLimits(limit, 20))]
    prompts = encode_prompts(examples, character_tokenizer(), cfg, 3, False)
    assert len(prompts.ids[0]) == limit
    assert prompts.truncated == 1

"""Tokenisation: special tokens, labels, limits and their counts, padding."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adept_ds.config.run import DataConfig
from adept_ds.data.encode import EncodedDataset, collate, encode, encode_prompt
from adept_ds.errors import UserError
from adept_ds.formats import Example

CHAT_TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}u {{ m['content'] }} e {% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
WORDS = ["<bos>", "<eos>", "<pad>", "u", "a", "e", *(f"w{i}" for i in range(100))]
BOS, EOS, PAD = 0, 1, 2


def words(first: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(first, first + count))


def ids(first: int, count: int) -> list[int]:
    return [6 + i for i in range(first, first + count)]


def word_tokenizer(add_bos: bool = True, **kwargs) -> PreTrainedTokenizerFast:
    """One token a word; BOS in front if asked for, as Llama's tokenizers do."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**tokens, **kwargs})


@pytest.fixture(scope="module")
def t5_tokenizer(shared_dir):
    return AutoTokenizer.from_pretrained(shared_dir / "data/t5")


def config(max_prompt_length: int = 20, max_length: int = 30) -> DataConfig:
    return DataConfig(max_prompt_length=max_prompt_length, max_length=max_length)


def example(prompt_words: int = 3, target_words: int = 2, **kwargs) -> Example:
    return Example("task", words(0, prompt_words), words(50, target_words), **kwargs)


def test_causal_labels_are_the_target_and_eos_only():
    row = encode(example(), word_tokenizer(), config(), 0, encoder_decoder=False)
    assert row.input_ids == [BOS, *ids(0, 3), *ids(50, 2), EOS]
    assert row.labels == [-100] * 4 + [*ids(50, 2), EOS]
    assert not row.prompt_truncated
    assert not row.target_truncated


def test_tokenizer_without_bos_rule_gets_none():
    row = encode(example(), word_tokenizer(add_bos=False), config(), 0, encoder_decoder=False)
    assert BOS not in row.input_ids


def test_bos_that_the_text_has_is_not_doubled():
    prompt, _ = encode_prompt(Example("t", "<bos> w1", "w2"), word_tokenizer(), config(), 0, encoder_decoder=False)
    assert prompt == [BOS, *ids(1, 1)]


def test_chat_prompt_has_the_templates_special_tokens_once():
    tokenizer = word_tokenizer(chat_template=CHAT_TEMPLATE)
    prompt, _ = encode_prompt(example(chat=True), tokenizer, config(), 0, encoder_decoder=False)
    assert prompt == [BOS, WORDS.index("u"), *ids(0, 3), WORDS.index("e"), WORDS.index("a")]


def test_chat_prompt_without_template_is_an_error():
    with pytest.raises(UserError, match=r"the data needs a chat template"):
        encode_prompt(example(chat=True), word_tokenizer(), config(), 0, encoder_decoder=False)


def test_long_prompt_is_cut_from_the_left_behind_bos():
    prompt, truncated = encode_prompt(example(prompt_words=30), word_tokenizer(), config(), 7, encoder_decoder=False)
    assert truncated
    assert prompt == [BOS, *ids(18, 12)]


def test_prompt_of_exactly_the_limit_is_whole():
    prompt, truncated = encode_prompt(example(prompt_words=12), word_tokenizer(), config(), 7, encoder_decoder=False)
    assert (len(prompt), truncated) == (13, False)


def test_long_target_is_cut_from_the_right_without_eos():
    row = encode(example(target_words=40), word_tokenizer(), config(), 7, encoder_decoder=False)
    assert row.target_truncated
    assert row.input_ids == [BOS, *ids(0, 3), *ids(50, 19)]
    assert len(row.input_ids) + 7 == 30


def test_target_of_exactly_the_limit_keeps_its_eos():
    row = encode(example(target_words=18), word_tokenizer(), config(), 7, encoder_decoder=False)
    assert not row.target_truncated
    assert row.input_ids[-1] == EOS
    assert len(row.input_ids) + 7 == 30


def test_longest_prompt_leaves_room_for_the_target():
    row = encode(example(prompt_words=90, target_words=40), word_tokenizer(), config(29, 30), 5, encoder_decoder=False)
    assert [label for label in row.labels if label != -100] == ids(50, 1)


def test_encoder_decoder_keeps_prompt_and_target_apart(t5_tokenizer):
    row = encode(Example("t", "premise: it rains", "1"), t5_tokenizer, config(), 5, encoder_decoder=True)
    assert t5_tokenizer.decode(row.input_ids) == "premise: it rains</s>"
    assert t5_tokenizer.decode(row.labels) == "1</s>"


def test_encoder_decoder_limits(t5_tokenizer):
    row = encode(Example("t", "one " * 50, "two " * 50), t5_tokenizer, config(), 5, encoder_decoder=True)
    assert (len(row.input_ids), len(row.labels)) == (15, 10)
    assert row.input_ids[-1] == t5_tokenizer.eos_token_id
    assert row.labels[-1] != t5_tokenizer.eos_token_id
    assert row.prompt_truncated
    assert row.target_truncated


def test_target_without_tokens_is_an_error(t5_tokenizer):
    with pytest.raises(UserError, match=r"t: the target .* has no token"):
        encode(Example("t", "a", "\n"), t5_tokenizer, config(), 5, encoder_decoder=True)


def test_tokenizer_without_eos_is_an_error():
    with pytest.raises(UserError, match="no EOS token"):
        encode(example(), word_tokenizer(eos_token=None), config(), 0, encoder_decoder=False)


def test_dataset_counts_truncations_and_tokens():
    examples = [example(), example(prompt_words=30), example(prompt_words=30, target_words=40)]
    dataset = EncodedDataset(examples, word_tokenizer(), config(), 7, encoder_decoder=False)
    assert len(dataset) == 3
    assert dataset.lengths == [7, 16, 23]
    assert (dataset.truncated_prompts, dataset.truncated_targets) == (2, 1)
    assert dataset.summary() == ("3 examples, 46 tokens (mean 15.3, longest 23); truncated: 2 prompts, 1 targets")


def test_empty_dataset_is_an_error():
    with pytest.raises(UserError, match="no examples"):
        EncodedDataset([], word_tokenizer(), config(), 0, encoder_decoder=False)


@pytest.fixture
def batch():
    return [encode(example(n, 1), word_tokenizer(), config(), 0, encoder_decoder=False) for n in (1, 3)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_and_unlabelled(batch, side):
    tensors = collate(batch, PAD, padding_side=side, pad_to_multiple_of=8)
    assert list(tensors) == ["input_ids", "attention_mask", "labels"]
    assert all((tensor.dtype, tensor.shape) == (torch.int64, (2, 8)) for tensor in tensors.values())
    kept = tensors["attention_mask"][0].bool()
    assert kept.tolist() == ([False] * 4 + [True] * 4 if side == "left" else [True] * 4 + [False] * 4)
    assert tensors["input_ids"][0][kept].tolist() == batch[0].input_ids
    assert tensors["labels"][0][kept].tolist() == batch[0].labels
    assert set(tensors["input_ids"][0][~kept].tolist()) == {PAD}
    assert set(tensors["labels"][0][~kept].tolist()) == {-100}


def test_batch_is_as_wide_as_its_longest_row(batch):
    assert collate(batch, PAD)["input_ids"].shape == (2, 6)


def test_encoder_decoder_labels_are_padded_on_the_right():
    rows = [encode(example(n, n), word_tokenizer(), config(), 0, encoder_decoder=True) for n in (1, 3)]
    tensors = collate(rows, PAD, padding_side="left")
    assert tensors["input_ids"][0].tolist() == [PAD, PAD, BOS, *ids(0, 1), EOS]
    assert tensors["labels"][0].tolist() == [*ids(50, 1), EOS, -100, -100]

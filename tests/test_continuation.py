"""Targets and generated texts as they go on with their prompt."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerFast

from adept_ds.config.run import DataConfig
from adept_ds.data.continuation import ContinuationDecoder, end_tokens, tokenise_continuation, until_end
from adept_ds.data.encode import encode
from adept_ds.formats import Example
from tests.models import EOS, START, character_tokenizer, spaced_tokenizer

PROMPT, TARGET = 'def add(a, b):\n    """Add."""\n', "    return a + b\n"


@pytest.fixture(scope="module")
def spaced() -> PreTrainedTokenizerFast:
    return spaced_tokenizer()


def test_a_target_has_the_tokens_that_it_has_behind_its_prompt(spaced: PreTrainedTokenizerFast) -> None:
    whole = spaced(PROMPT + TARGET, add_special_tokens=False)["input_ids"]
    read = spaced(PROMPT, add_special_tokens=False)["input_ids"]
    assert tokenise_continuation(spaced, [TARGET]) == [whole[len(read) :]]
    row = encode(Example("1", PROMPT, TARGET), spaced, DataConfig(), 0, False)
    assert row.input_ids == [*whole, EOS]


def test_a_tokenizer_that_adds_no_space_encodes_a_target_as_it_stands() -> None:
    plain = character_tokenizer()
    assert tokenise_continuation(plain, [TARGET, "x"]) == plain([TARGET, "x"], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", [TARGET, " x", "x", "  two", "\n", "é", ""])
def test_a_text_survives_the_way_there_and_back(spaced: PreTrainedTokenizerFast, text: str) -> None:
    before = spaced(PROMPT, add_special_tokens=False)["input_ids"]
    (ids,) = tokenise_continuation(spaced, [text])
    assert ContinuationDecoder(spaced)(before, ids) == text


def test_a_text_with_nothing_before_it_is_decoded_alone(spaced: PreTrainedTokenizerFast) -> None:
    ids = spaced("word", add_special_tokens=False)["input_ids"]
    assert ContinuationDecoder(spaced)([], ids) == "word"


def test_special_tokens_have_no_text(spaced: PreTrainedTokenizerFast) -> None:
    spaced = spaced_tokenizer()
    spaced.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    turn = spaced.convert_tokens_to_ids("<|turn|>")
    before = [*spaced("ask", add_special_tokens=False)["input_ids"], turn]
    (ids,) = tokenise_continuation(spaced, [" yes"])
    assert ContinuationDecoder(spaced)(before, [START, *ids, turn]) == " yes"


def test_a_context_that_ends_within_a_character_does_no_harm(spaced: PreTrainedTokenizerFast) -> None:
    first, second = (spaced.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "é".encode())
    assert ContinuationDecoder(spaced)([first], [second, *tokenise_continuation(spaced, ["x"])[0]]).endswith("x")


@pytest.mark.parametrize(("own", "ends"), [(None, [EOS]), (7, [EOS, 7]), ([EOS, 9], [EOS, 9]), ([5], [EOS, 5])])
def test_the_token_that_ends_targets_ends_answers_whatever_the_backbone_says(
    spaced: PreTrainedTokenizerFast, own: int | list[int] | None, ends: list[int]
) -> None:
    assert end_tokens(spaced, GenerationConfig(eos_token_id=own)) == ends


def test_an_answer_has_neither_its_end_token_nor_padding() -> None:
    assert until_end([5, 6, 1, 7], [1], None) == [5, 6]
    assert until_end([5, 6, 0, 0], [1], 0) == [5, 6]
    assert until_end([0, 5, 0], [1], 0) == [0, 5]

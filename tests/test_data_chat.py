"""Chats through chat templates: which tokens are learnt, what an answer is given to, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adept_ds.config.run import DataConfig
from adept_ds.data.encode import EncodedDataset, encode, encode_prompt, end_of_answers
from adept_ds.data.own import OwnExamples
from adept_ds.errors import UserError
from adept_ds.formats import Conversation, Example, Message

ALTERNATE = """\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"""
CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
CHATML_MARKED = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}
{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA_3 = """\
{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>'
+ message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
LLAMA_2 = f"""\
{{% if messages[0]['role'] == 'system' %}}{{% set loop_messages = messages[1:] %}}
{{% set system_message = messages[0]['content'] %}}{{% else %}}{{% set loop_messages = messages %}}
{{% set system_message = false %}}{{% endif %}}{{% for message in loop_messages %}}{ALTERNATE}
{{% if loop.index0 == 0 and system_message != false %}}
{{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}}
{{% else %}}{{% set content = message['content'] %}}{{% endif %}}{{% if message['role'] == 'user' %}}
{{{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}}}{{% elif message['role'] == 'assistant' %}}
{{{{ ' ' + content.strip() + ' ' + eos_token }}}}{{% endif %}}{{% endfor %}}"""
GEMMA = f"""\
{{{{ bos_token }}}}{{% if messages[0]['role'] == 'system' %}}
{{{{ raise_exception('System role not supported') }}}}{{% endif %}}
{{% for message in messages %}}{ALTERNATE}{{% if (message['role'] == 'assistant') %}}
{{% set role = 'model' %}}{{% else %}}{{% set role = message['role'] %}}{{% endif %}}
{{{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}}}{{% endfor %}}
{{% if add_generation_prompt %}}{{{{'<start_of_turn>model\\n'}}}}{{% endif %}}"""
QWEN_3 = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}
{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{ message['content'] + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""Of which only this matters: the last turn alone has a place for thoughts."""
# These are written in lines here; the published ones are one line each.
CHATML, CHATML_MARKED, LLAMA_3, LLAMA_2, GEMMA, QWEN_3 = (
    re.sub(r"\n(?=[{+])", "", template) for template in (CHATML, CHATML_MARKED, LLAMA_3, LLAMA_2, GEMMA, QWEN_3)
)
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
SPECIAL = (
    *("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

CHAT = (("user", "Hi"), ("assistant", "Hello!"), ("user", "2 + 2?"), ("assistant", "It is\n4."))
CFG = DataConfig(max_prompt_length=500, max_length=1000)


def tokenizer_with(template: str | None, merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, all bytes single unless merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )


def chat(*turns: tuple[str, str]) -> Conversation:
    messages = tuple(Message(role, content) for role, content in turns)
    return Conversation("f:1", "", messages[-1].content, messages=messages)


def learnt_parts(
    example: Conversation, tokenizer: PreTrainedTokenizerBase, cfg: DataConfig = CFG
) -> tuple[str, list[str]]:
    """All that the model reads, and the stretches that it learns."""
    row = encode(example, tokenizer, CFG, 0, encoder_decoder=False)
    assert [label for label in row.labels if label != -100] == [
        id for id, label in zip(row.input_ids, row.labels, strict=True) if label != -100
    ]
    parts: list[list[int]] = [[]]
    for label in row.labels:
        if label == -100:
            parts.append([])
        else:
            parts[-1].append(label)
    return tokenizer.decode(row.input_ids), [tokenizer.decode(part) for part in parts if part]


SYSTEM = ("system", "Be brief.")
EXPECTED = {
    "chatml": (
        CHATML,
        (SYSTEM,),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "[Hello!<|im_end|>]\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n[It is\n4.<|im_end|>]\n",
    ),
    "chatml, its own system": (
        CHATML,
        (),
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n[Hello!<|im_end|>]\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
        "[It is\n4.<|im_end|>]\n",
    ),
    "chatml, marked": (
        CHATML_MARKED,
        (SYSTEM,),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "[Hello!<|im_end|>]\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n[It is\n4.<|im_end|>]\n",
    ),
    "chatml, end outside of the mark": (
        CHATML_MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}"),
        (),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Hello!<|im_end|>]\n"
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n[It is\n4.<|im_end|>]\n",
    ),
    "llama-3": (
        LLAMA_3,
        (SYSTEM,),
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "[Hello!<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[It is\n4.<|eot_id|>]",
    ),
    "llama-2": (
        LLAMA_2,
        (SYSTEM,),
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST][ Hello! </s>]<s>[INST] 2 + 2? [/INST][ It is\n4. </s>]",
    ),
    "zephyr": (
        ZEPHYR,
        (SYSTEM,),
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n[Hello!</s>]\n"
        "<|user|>\n2 + 2?</s>\n<|assistant|>\n[It is\n4.</s>]\n",
    ),
    "gemma": (
        GEMMA,
        (),
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n[Hello!<end_of_turn>]\n"
        "<start_of_turn>user\n2 + 2?<end_of_turn>\n<start_of_turn>model\n[It is\n4.<end_of_turn>]\n",
    ),
}
"""Template, turns before the chat, and what is read, with what is learnt in brackets (those of [INST] apart)."""


@pytest.mark.parametrize("name", EXPECTED)
def test_the_assistants_turns_are_learnt_with_their_ends(name: str) -> None:
    template, before, expected = EXPECTED[name]
    text, parts = learnt_parts(chat(*before, *CHAT), tokenizer_with(template))
    shown = expected.replace("[INST]", "(INST)").replace("[/INST]", "(/INST)")
    assert parts == [piece.partition("]")[0] for piece in shown.split("[")[1:]]
    plain = shown.replace("[", "").replace("]", "").replace("(INST)", "[INST]").replace("(/INST)", "[/INST]")
    assert text == plain
    assert text.count("<s>") == plain.count("<s>")


@pytest.mark.parametrize("name", EXPECTED)
def test_an_answer_is_given_to_what_was_read_before_it_in_training(name: str) -> None:
    template, before, _ = EXPECTED[name]
    tokenizer = tokenizer_with(template)
    row = encode(chat(*before, *CHAT), tokenizer, CFG, 0, encoder_decoder=False)
    for example in (chat(*before, *CHAT), chat(*before, *CHAT[:-1])):
        prompt, truncated = encode_prompt(example, tokenizer, CFG, 0, encoder_decoder=False)
        assert (row.input_ids[: len(prompt)], truncated) == (prompt, False)
    assert row.labels[len(prompt)] != -100
    assert row.labels[len(prompt) - 1] == -100


def test_a_token_across_the_edge_is_cut_there_as_it_is_in_an_answer() -> None:
    """The header's line break and the answer's own are one token of the whole text."""
    tokenizer = tokenizer_with(CHATML_MARKED, merges=[("Ċ", "Ċ")])
    example = chat(("user", "Hi"), ("assistant", "\nHello"))
    assert learnt_parts(example, tokenizer)[1] == ["\nHello<|im_end|>"]
    prompt, _ = encode_prompt(example, tokenizer, CFG, 0, encoder_decoder=False)
    row = encode(example, tokenizer, CFG, 0, encoder_decoder=False)
    assert row.input_ids[: len(prompt)] == prompt


def test_a_turn_that_nothing_ends_is_ended_by_eos() -> None:
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    assert learnt_parts(chat(*CHAT[:2]), tokenizer_with(template))[1] == ["assistant: Hello!</s>"]


def test_a_chat_that_the_assistant_begins() -> None:
    assert learnt_parts(chat(CHAT[1], *CHAT), tokenizer_with(LLAMA_3))[1] == [
        "Hello!<|eot_id|>",
        "Hello!<|eot_id|>",
        "It is\n4.<|eot_id|>",
    ]


def test_a_tokenizer_that_gives_no_offsets() -> None:
    tokenizer = ByT5Tokenizer(
        extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=CHATML
    )
    assert not tokenizer.is_fast
    text, parts = learnt_parts(chat(SYSTEM, *CHAT), tokenizer)
    assert parts == ["Hello!<|im_end|>", "It is\n4.<|im_end|>"]
    assert text == EXPECTED["chatml"][2].replace("[", "").replace("]", "")


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (GEMMA, (SYSTEM, *CHAT), "f:1: the tokenizer's chat template refuses this chat: System role not supported"),
        (LLAMA_2, (CHAT[0], *CHAT), "refuses this chat: Conversation roles must alternate"),
        ("{{ 1 + 'a' }}", CHAT, "f:1: the tokenizer's chat template fails on this chat .TypeError"),
        (QWEN_3, CHAT, r"f:1: what .* writes for turn 2 of 4 depends on the turns after it"),
        (CHATML_MARKED.replace("'assistant' %}", "'model' %}"), CHAT, r"marks 0 parts .* has 2 of its turns"),
        (None, CHAT, r"the data needs a chat template, and the tokenizer .* has none; .*model\.tokenizer"),
    ],
    ids=["system", "alternate", "fails", "depends", "unmarked", "none"],
)
def test_what_cannot_be_learnt_is_refused(
    template: str | None, turns: tuple[tuple[str, str], ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        encode(chat(*turns), tokenizer_with(template), CFG, 0, encoder_decoder=False)


def test_a_template_that_depends_on_later_turns_serves_chats_with_one_answer() -> None:
    assert learnt_parts(chat(*CHAT[:2]), tokenizer_with(QWEN_3))[1] == ["<think>\n\n</think>\n\nHello!<|im_end|>"]


def test_long_chats_are_cut_and_those_without_an_answer_left_out() -> None:
    tokenizer = tokenizer_with(CHATML_MARKED)
    cfg = DataConfig(max_prompt_length=40, max_length=60)
    rows = [chat(*CHAT[:2]), chat(*CHAT), chat(("user", "x" * 80), ("assistant", "y"))]
    dataset = EncodedDataset(OwnExamples(rows, ()), tokenizer, cfg, 0, encoder_decoder=False)
    assert (len(dataset), dataset.left_out, dataset.truncated_targets) == (2, 1, 1)
    assert all(any(label != -100 for label in dataset[i].labels) for i in range(len(dataset)))
    assert "left out: 1 chats without an answer within data.max_length" in dataset.summary()
    assert dataset.summary().endswith("the loss is on the assistant's turns, found by the template's generation mark")
    with pytest.raises(UserError, match=r"of the 1 chats none has a turn .* data\.max_length 60"):
        EncodedDataset(rows[2:], tokenizer, cfg, 0, encoder_decoder=False)


def test_an_encoder_decoder_model_learns_the_last_answer() -> None:
    tokenizer = tokenizer_with(CHATML_MARKED)
    row = encode(chat(*CHAT), tokenizer, CFG, 0, encoder_decoder=True)
    assert tokenizer.decode(row.input_ids).endswith("2 + 2?<|im_end|>\n<|im_start|>assistant\n</s>")
    assert tokenizer.decode(row.labels) == "It is\n4.</s>"


def test_a_form_for_tokenizers_without_a_template() -> None:
    example = Conversation("f:1", "Q\n", "A", messages=(Message("user", "Q"), Message("assistant", "A")))
    plain = tokenizer_with(None)
    row = encode(example, plain, CFG, 0, encoder_decoder=False)
    assert plain.decode(row.input_ids) == "Q\nA</s>"
    assert plain.decode([label for label in row.labels if label != -100]) == "A</s>"
    summary = EncodedDataset(OwnExamples([example], ()), plain, CFG, 0, encoder_decoder=False).summary()
    assert summary.endswith("the tokenizer has no chat template, so prompts are shown without one")
    assert learnt_parts(example, tokenizer_with(CHATML))[1] == ["A<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (CHATML_MARKED, "<|im_end|>"),
        (LLAMA_3, "<|eot_id|>"),
        (LLAMA_2, "</s>"),
        (GEMMA, "<end_of_turn>"),
        (QWEN_3, "<|im_end|>"),
        (ZEPHYR, "</s>"),
    ],
    ids=["chatml", "chatml-marked", "llama-3", "llama-2", "gemma", "qwen-3", "zephyr"],
)
def test_an_answer_ends_with_the_token_that_ends_its_turn(template: str, end: str) -> None:
    tokenizer = tokenizer_with(template)
    assert end_of_answers([chat(*CHAT)], tokenizer) == [tokenizer.convert_tokens_to_ids(end)]


def test_an_answer_outside_a_chat_has_no_such_end() -> None:
    assert end_of_answers([Example("1", "a", "b")], tokenizer_with(CHATML)) == []
    assert end_of_answers([Example("1", "a", "b", chat=True)], tokenizer_with("{{ messages[0].wrong.thing }}")) == []

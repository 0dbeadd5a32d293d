"""The settings that are chosen for a model and a user's own rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

from adept_ds.config.batch import count_steps, warmup_steps
from adept_ds.config.loader import load_values
from adept_ds.config.run import RunConfig
from adept_ds.data import defaults
from adept_ds.data.defaults import ChosenSettings, settings_for_own_data
from adept_ds.errors import UserError
from tests.models import llama_config, save, seeded, t5_config
from tests.test_data_chat import CHATML, tokenizer_with


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer has a chat template."""
    tokenizer = tokenizer_with(CHATML)
    model = seeded(lambda: LlamaForCausalLM(llama_config(vocab_size=len(tokenizer), max_position_embeddings=512)))
    return save(model, tokenizer, tmp_path_factory.mktemp("models") / "tiny-llama")


def chats(path: Path, count: int, words: int = 3) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i} " * words}]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chosen_run(chosen: ChosenSettings, *overrides: str) -> RunConfig:
    return load_values(chosen.settings, "chosen", overrides).run


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "steps"),
    [(10, 1, 20, 200), (100, 1, 11, 990), (520, 4, 9, 1053), (2_000, 16, 9, 1017), (30_000, 16, 1, 1844)],
)
def test_batch_and_epochs_follow_the_number_of_rows(
    tmp_path: Path, llama: Path, rows: int, batch: int, epochs: int, steps: int
) -> None:
    chosen = settings_for_own_data(str(llama), str(chats(tmp_path / "my.jsonl", rows)))
    run = chosen_run(chosen)
    held_out = 0 if rows < 20 else min(rows // 10, 500)
    assert (run.train.global_batch_size, run.train.epochs) == (batch, epochs)
    assert count_steps(run.train, rows - held_out) == steps
    assert warmup_steps(run.train, steps) == round(0.06 * steps)
    assert f"steps: {steps:,} of {batch} examples" in "\n".join(chosen.reasons)
    assert run.logging.run_dir == "runs/tiny-llama-my"
    assert (run.data.messages_field, run.train.sharding) == ("messages", "auto")
    assert run.train.learning_rate.soft_prompt == (0.005 if steps <= 500 else 0.001)
    # 30,000 rows: once an epoch would be once in all.
    assert run.eval.every_steps == (461 if rows == 30_000 else None)


def test_lengths_are_those_of_the_rows_and_what_is_cut_is_said(tmp_path: Path, llama: Path) -> None:
    chosen = settings_for_own_data(str(llama), str(chats(tmp_path / "my.jsonl", 30, words=20)))
    data = chosen_run(chosen).data
    # 7 of the soft prompt, 78 up to the answer, 20 times three letters and the end of the turn.
    assert (data.max_prompt_length, data.max_length) == (128, 146)
    assert any("the longest has 146 tokens" in line and "cut 0 of them" in line for line in chosen.reasons)
    long = settings_for_own_data(str(llama), str(chats(tmp_path / "long.jsonl", 30, words=200)))
    data = chosen_run(long).data
    assert (data.max_prompt_length, data.max_length) == (128, 512)  # the model's positions
    assert any("cut 20 of them" in line for line in long.reasons)


def test_what_is_given_is_not_chosen_and_is_taken_into_account(tmp_path: Path, llama: Path) -> None:
    path = chats(tmp_path / "my.jsonl", 100)
    given = ["train.max_steps=40", "train.warmup_steps=2", "train.global_batch_size=6", "data.validation_fraction=0.5"]
    chosen = settings_for_own_data(str(llama), str(path), given, world_size=2)
    run = chosen_run(chosen, *given)
    assert (run.train.max_steps, run.train.epochs, run.train.warmup_steps) == (40, None, 2)
    assert run.train.warmup_ratio is None
    assert any("steps: 40 of 6 examples, 9 an epoch" in line for line in chosen.reasons)
    assert any("on 50 held-out rows, every 9 steps" in line for line in chosen.reasons)
    lora = chosen_run(settings_for_own_data(str(llama), str(path), ["method.name=lora"]), "method.name=lora")
    assert (lora.method.name, lora.train.learning_rate.adapter) == ("lora", 1e-4)


@pytest.mark.parametrize(("world_size", "batch"), [(2, 2), (3, 3), (8, 8)])
def test_the_batch_divides_by_the_ranks(tmp_path: Path, llama: Path, world_size: int, batch: int) -> None:
    chosen = settings_for_own_data(str(llama), str(chats(tmp_path / "my.jsonl", 150)), world_size=world_size)
    assert chosen_run(chosen).train.global_batch_size == batch


def test_long_rows_are_taken_in_smaller_passes(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "TOKENS_IN_PASS", 1_000)
    chosen = settings_for_own_data(str(llama), str(chats(tmp_path / "my.jsonl", 1_200, words=50)))
    run = chosen_run(chosen)
    assert (run.train.global_batch_size, run.train.micro_batch_size) == (16, 2)


@pytest.mark.parametrize(
    ("cuda", "has_bf16", "t5", "dtype"),
    [
        (False, True, False, "bf16"),
        (False, False, False, "fp32"),
        (True, True, False, "bf16"),
        (True, False, False, "fp16"),
        (True, False, True, "fp32"),
    ],
)
def test_precision_is_what_the_machine_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, has_bf16: bool, t5: bool, dtype: str
) -> None:
    monkeypatch.setattr(defaults.torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(defaults.torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(defaults, "has_fast_bf16", lambda: has_bf16)
    assert defaults._precision(t5)[0] == dtype


def test_an_encoder_decoder_model(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(None)
    model = seeded(lambda: T5ForConditionalGeneration(t5_config(vocab_size=len(tokenizer))))
    folder = save(model, tokenizer, tmp_path / "tiny-t5")
    path = tmp_path / "qa.csv"
    path.write_text("question,answer\n" + "".join(f"{'long ' * 40 * (i % 2)}{i}?,{i}\n" for i in range(40)))
    run = chosen_run(settings_for_own_data(str(folder), str(path)))
    assert (run.method.num_virtual_tokens, run.train.learning_rate.soft_prompt) == (60, 0.3)
    assert run.data.max_prompt_length == 265  # 60 of the soft prompt, 200 + 2 letters, ?, a line break, EOS
    assert run.data.max_length - run.data.max_prompt_length == 3


@pytest.mark.parametrize(
    ("name", "folder"),
    [("owner/some.set", "some.set"), ("data/my.v2.jsonl.gz", "my.v2"), ("data/", "data"), ("x.csv", "x")],
)
def test_the_run_folder_is_called_after_model_and_data(name: str, folder: str) -> None:
    assert defaults._name(name) == folder


def test_mistakes_are_told(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(UserError, match=r"no-file\.jsonl: no such file"):
        settings_for_own_data(str(llama), str(tmp_path / "no-file.jsonl"))
    with pytest.raises(UserError, match=r"model\.name_or_path"):
        settings_for_own_data(str(tmp_path / "no-model"), str(chats(tmp_path / "my.jsonl", 5)))
    with pytest.raises(UserError, match=r"train\.epoch\b.*\n.*did you mean train\.epochs"):
        settings_for_own_data(str(llama), str(tmp_path / "my.jsonl"), ["train.epoch=3"])

"""Training on a user's own chats, with the settings that are chosen for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from adept_ds.data.defaults import settings_for_own_data
from tests.conftest import RunRanks, losses
from tests.models import llama_config, save, seeded
from tests.test_data_chat import CHATML_MARKED, tokenizer_with

pytestmark = pytest.mark.slow

QUESTIONS = ("What is it?", "And now?", "Sure?")
ANSWERS = ("It is seven.", "Seven again.", "Yes, seven.")


def write_chats(path: Path) -> Path:
    """Forty chats of one to three answers, with a byte order mark, Windows line ends and an empty line."""
    lines = []
    for number in range(40):
        messages = [{"role": "system", "content": f"Chat {number}"}]
        for question, answer in list(zip(QUESTIONS, ANSWERS, strict=True))[: 1 + number % 3]:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": number, "messages": messages}))
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([lines[0], "", *lines[1:]]).encode())
    return path


def test_two_ranks_learn_chats_and_choose_the_best_by_held_out_ones(run_ranks: RunRanks, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHATML_MARKED)
    model = seeded(lambda: LlamaForCausalLM(llama_config(vocab_size=len(tokenizer), max_position_embeddings=512)))
    folder = save(model, tokenizer, tmp_path / "model")
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML_MARKED
    overrides = ["train.max_steps=60", "train.global_batch_size=4", "method.name=full", "eval.every_steps=20"]
    data = write_chats(tmp_path / "chats.jsonl")
    chosen = settings_for_own_data(str(folder), str(data), overrides, world_size=2)
    run_dir = tmp_path / "run"
    sections = chosen.settings | {
        "method": {"name": "full"},  # The model is random, and a prompt alone teaches it little.
        "eval": {"every_steps": 20},
        "model": {"name_or_path": str(folder), "dtype": "fp32"},
        "logging": {"run_dir": str(run_dir), "every_steps": 1, "trackers": []},
    }
    sections["train"] |= {"max_steps": 60, "global_batch_size": 4, "learning_rate": {"backbone": 0.01}}
    result = run_ranks(2, "launchers/train.py", sections)
    assert result.returncode == 0, result.stdout
    said = result.stdout
    assert f"  {data}: 40 rows; messages is a chat; not used: id" in said
    assert "held out for validation: 4 rows, drawn at random (data.split_seed 42)" in said
    assert said.count("the loss is on the assistant's turns, found by the template's generation mark") == 1
    first, *_, last = losses(run_dir)
    assert last < 0.3 * first
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    status = json.loads((run_dir / "status.json").read_text())
    assert list(held_out) == [20, 40, 60]
    assert held_out[status["best_step"]] == min(held_out.values()) == status["best_value"]

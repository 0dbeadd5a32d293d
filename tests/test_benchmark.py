"""The throughput benchmark on a small model: what is compared is comparable, and the report is whole."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adept_ds.benchmark import (
    ATTENTION,
    BACKBONE,
    GROUPS,
    LINEAR,
    OTHER,
    OURS,
    PEFT_DYNAMIC,
    PEFT_MAXIMUM,
    benchmark,
    build_contenders,
    choose_batches,
    event_groups,
    measure,
    shuffle_examples,
    text_report,
)
from adept_ds.config import RunConfig
from adept_ds.errors import UserError
from adept_ds.frozen_linear import FrozenLinear
from evals.throughput import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of the bundled problems on a random one-layer Llama with a token for each byte."""
    folder = tmp_path_factory.mktemp("llama")
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), pad_token_id=0, **shape)).save_pretrained(folder)
    return {
        "model": {"name_or_path": str(folder), "dtype": "fp32"},
        "train": {"epochs": 10, "global_batch_size": 4},
    }


@pytest.fixture(scope="module")
def run(config: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(config)


def test_contenders_train_on_the_same_examples(run: RunConfig):
    rows = []
    for contender in build_contenders(run, 3, CPU):
        batches = contender.batches
        rows.append(
            sorted(
                ids[mask == 1].tolist()
                for batch in batches
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            )
        )
        assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4]
    assert rows[0] == rows[1] == rows[2]


def test_every_row_of_the_maximum_contender_has_the_protocols_length(run: RunConfig):
    widths = {batch["input_ids"].shape[1] for batch in build_contenders(run, 3, CPU)[2].batches}
    assert widths == {run.data.max_length - run.method.num_virtual_tokens}


def test_contenders_compute_the_same_loss_from_the_same_prompt(run: RunConfig):
    ours, peft, _ = build_contenders(run, 2, CPU)
    prompt = ours.model.trainable_parameters()["soft_prompt"].detach()
    with torch.no_grad():
        peft.model.prompt_encoder.default.embedding.weight.copy_(prompt)
    batch = peft.batches[0]
    torch.testing.assert_close(ours.step(batch), peft.step(batch), rtol=1e-5, atol=1e-5)


def test_contenders_take_turns(run: RunConfig):
    contenders = build_contenders(run, 1, CPU)
    measure(contenders, rounds=2)
    assert [len(contender.seconds) for contender in contenders] == [2, 2, 2]


def test_batches_are_spread_over_the_lengths():
    lengths = list(range(100))
    longest = [max(lengths[index] for index in batch) for batch in choose_batches(lengths, 4, 5, seed=0)]
    assert longest == sorted(longest)
    assert longest[0] < 30
    assert longest[-1] > 70


def test_more_steps_than_batches_are_refused():
    with pytest.raises(UserError, match=r"--steps is 26, but the data has 25 batches of 4"):
        choose_batches(list(range(100)), 4, 26, seed=0)


def test_shuffling_keeps_the_examples_and_mixes_the_lengths():
    batches = choose_batches(list(range(100)), 4, 10, seed=0)
    shuffled = shuffle_examples(batches, seed=0)
    assert sorted(chain(*shuffled)) == sorted(chain(*batches))
    assert sum(max(batch) for batch in shuffled) > sum(max(batch) for batch in batches)


def test_every_part_of_a_step_has_its_share(run: RunConfig):
    seconds = benchmark(run, steps=1, rounds=1)["adept_ds_seconds_per_step"]
    assert list(seconds) == list(GROUPS)
    assert all(own > 0 for own in seconds.values())
    assert seconds[OTHER] < 0.5 * sum(seconds.values())


def test_operators_belong_to_the_part_that_they_are_in_forward_and_backward():
    linear, x = FrozenLinear(nn.Linear(8, 8)).requires_grad_(False), torch.randn(1, 2, 5, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function(BACKBONE):
            with record_function(LINEAR):
                y = linear(x)
            z = F.scaled_dot_product_attention(y, y, y, is_causal=True)
        z.sum().backward()
    events = list(profiler.events())
    of_operator: dict[str, list[str]] = {}
    for event, group in zip(events, event_groups(events), strict=True):
        of_operator.setdefault(event.name, []).append(group)
    assert of_operator["aten::mm"] == [LINEAR]
    assert of_operator["_FrozenLinearFunctionBackward"] == [LINEAR]
    assert of_operator["aten::_scaled_dot_product_flash_attention_for_cpu"] == [ATTENTION]
    assert of_operator["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] == [ATTENTION]


def test_report_and_file_have_the_same_figures(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file, out = tmp_path / "run.json", tmp_path / "throughput.json"
    file.write_text(json.dumps(config))
    main(["--config", str(file), "--steps", "1", "--rounds", "2", "--out", str(out)])
    result = json.loads(out.read_text())
    assert list(result["contenders"]) == [OURS, PEFT_DYNAMIC, PEFT_MAXIMUM]
    assert capsys.readouterr().out == text_report(result) + "\n"


def test_steps_must_be_a_count(config: dict[str, Any], tmp_path: Path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"--steps: '0': expected an integer >= 1"):
        main(["--config", str(file), "--steps", "0"])

"""What `adept-ds try` knows of a result from where it lies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from adept_ds.config.method import AdapterConfig
from adept_ds.config.run import DataConfig, GenerationConfig, ModelConfig, RunConfig
from adept_ds.distributed import World
from adept_ds.errors import UserError
from adept_ds.evaluation.side_by_side import Origin, SideBySide, origin_of
from adept_ds.formats.records import Example, Message, TokenLimits
from adept_ds.model.adapted_model import get_adept_model
from tests.models import BACKBONES, character_tokenizer, save, seeded

MODEL = ModelConfig(name_or_path="tiny")


def asked(data: DataConfig):
    return Origin(MODEL, data).asked("Hi")


def test_a_prompt_has_the_form_of_those_that_were_trained_on(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert asked(DataConfig(format="own", path=str(tmp_path / "chats.jsonl"))).turns == (Message("user", "Hi"),)
    assert asked(DataConfig(format="mbpp-instruct")).turns == (Message("user", "Hi"),)
    assert asked(DataConfig()).turns == ()


def test_the_source_of_a_task_ends_as_in_training(tmp_path: Path) -> None:
    assert asked(DataConfig(format="tasks", tasks=("rte",))).limits == TokenLimits(256, None)
    assert asked(DataConfig(format="tasks", tasks=(str(tmp_path / "gone.json"),))) is None


@pytest.mark.parametrize(
    ("task", "message"),
    [(None, "--task is missing; .* has parameters of each of a, b"), ("c", "--task is 'c'; .* of each of a, b")],
)
def test_an_adapter_of_several_tasks_is_read_with_those_of_one(
    tmp_path: Path, world: World, task: str | None, message: str
) -> None:
    backbone = save(seeded(BACKBONES["llama"]), character_tokenizer(), tmp_path / "model")
    loaded = LlamaForCausalLM.from_pretrained(backbone)
    torch.manual_seed(0)
    model = get_adept_model(loaded, AdapterConfig(tasks=("a", "b")))
    for parameter in model.trainable_parameters().values():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "best")
    origin = origin_of(tmp_path / "best", None)
    example = Example("prompt", "Hi", "")
    greedy = GenerationConfig(do_sample=False, max_new_tokens=4, stop=())
    texts = {
        (name, is_tuned): SideBySide(tmp_path / "best", origin, world, name).write(example, is_tuned, greedy)
        for name in ("a", "b")
        for is_tuned in (False, True)
    }
    assert texts["a", False] == texts["b", False]
    assert len({texts["a", False], texts["a", True], texts["b", True]}) == 3
    with pytest.raises(UserError, match=message):
        SideBySide(tmp_path / "best", origin, world, task)


def test_rows_that_are_not_here_say_nothing(tmp_path: Path) -> None:
    assert asked(DataConfig(format="own", path=str(tmp_path / "gone.jsonl"))) is None


def test_a_results_run_is_the_folder_above_it(tmp_path: Path) -> None:
    run = RunConfig.model_validate({"model": {"name_or_path": "its"}, "train": {"max_steps": 900}})
    (tmp_path / "config.json").write_text(run.model_dump_json(by_alias=True))
    for result in (tmp_path / "best", tmp_path / "checkpoints" / "step-00000005"):
        assert origin_of(result, None).model.name_or_path == "its"
        assert origin_of(result, "another").model.name_or_path == "another"


def test_a_folder_that_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        origin_of(tmp_path / "deep" / "nothing", None)

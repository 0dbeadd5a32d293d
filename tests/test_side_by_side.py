"""What `adept-ds try` knows of a result from where it lies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adept_ds.config.run import DataConfig, ModelConfig, RunConfig
from adept_ds.errors import UserError
from adept_ds.evaluation.side_by_side import Origin, origin_of
from adept_ds.formats.records import Message

MODEL = ModelConfig(name_or_path="tiny")


def asked(data: DataConfig):
    return Origin(MODEL, data).asked("Hi")


def test_a_prompt_has_the_form_of_those_that_were_trained_on(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert asked(DataConfig(format="own", path=str(tmp_path / "chats.jsonl"))).turns == (Message("user", "Hi"),)
    assert asked(DataConfig(format="mbpp-instruct")).turns == (Message("user", "Hi"),)
    assert asked(DataConfig()).turns == ()


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

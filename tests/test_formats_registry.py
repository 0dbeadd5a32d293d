"""The registry of formats: a benchmark is one entry, and nobody asks for a format by its name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from adept_ds.config.loader import load_config
from adept_ds.config.run import DataConfig
from adept_ds.config.schema import json_schema
from adept_ds.data.hub import hub_data_sets
from adept_ds.data.problems import load_examples, load_problems, read_problems
from adept_ds.errors import UserError
from adept_ds.formats import FORMATS, Format
from adept_ds.formats.mbpp import MbppRecord
from adept_ds.formats.problem_forms import ProblemForm
from adept_ds.formats.registry import ProblemSet
from adept_ds.formats.splits import halves
from adept_ds.planner.dry_run import count_training_examples
from adept_ds.sandbox import Program, Sandbox
from adept_ds.slurm.submission import benchmark
from tests.ranks import REPOSITORY

TOY = Format(
    "one-line riddles",
    splits=("train", "test"),
    problems=ProblemSet(
        ProblemForm(MbppRecord, lambda record, shots: f"# {record.text}\n", lambda record: record.code, stop=("\n\n",)),
        halves,
        hub_config="plain",
        released_train_size=7,
    ),
)


@pytest.fixture
def toy_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new benchmark: one entry, and a file of its problems."""
    monkeypatch.setitem(FORMATS, "toy", TOY)
    rows = [
        {
            "task_id": i,
            "text": f"Add {i}.",
            "code": f"f = lambda x: x + {i}",
            "test_list": [f"assert f(1) == {1 + i}"],
        }
        for i in range(1, 5)
    ]
    path = tmp_path / "toy.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_an_entry_is_a_benchmark_that_trains_and_is_scored(toy_file: str) -> None:
    cfg = DataConfig(format="toy", path=toy_file)
    assert [example.prompt for example in load_examples(cfg, "train")] == ["# Add 1.\n", "# Add 2.\n"]
    problems = load_problems(cfg, "test")
    assert [problem.task_id for problem in problems] == ["MBPP/3", "MBPP/4"]
    with Sandbox() as sandbox:
        programs = [Program(problem.task_id, problem.program(problem.target), problem.tests) for problem in problems]
        assert {verdict.status for verdict in sandbox.run(programs)} == {"passed"}
    assert len(read_problems(toy_file, "toy")) == 4


def test_an_entry_is_known_to_config_plan_and_jobs(toy_file: str, tmp_path: Path) -> None:
    config = tmp_path / "run.json"
    settings = {"model": {"name_or_path": "m"}, "train": {"epochs": 1}, "eval": {"metric": "pass@1"}}
    config.write_text(json.dumps({**settings, "data": {"format": "toy", "path": toy_file}}))
    run = load_config(config).run
    assert benchmark(run) == "mbpp"
    assert count_training_examples(run.data)[0] == 2
    assert "toy" in json.loads(json_schema())["$defs"]["DataConfig"]["properties"]["format"]["enum"]
    far = DataConfig(format="toy", path="some/where")
    assert count_training_examples(far)[0] == 7
    assert hub_data_sets(far) == ["some/where"]


def test_an_entry_has_the_splits_and_settings_that_it_says(toy_file: str) -> None:
    with pytest.raises(UserError, match=r"unknown split 'validation' of data\.format toy; expected train, test"):
        load_problems(DataConfig(format="toy", path=toy_file), "validation")
    with pytest.raises(ValueError, match="few_shot is not for format: toy; it goes with mbpp"):
        DataConfig(format="toy", few_shot=1)


def test_a_form_without_tests_cannot_read_problems() -> None:
    with pytest.raises(UserError, match=r"unknown form 'mbpp-papre' .*did you mean 'mbpp-paper'"):
        read_problems(None, "mbpp-papre")
    with pytest.raises(UserError, match="unknown form 'jsonl'"):
        read_problems(None, "jsonl")


def test_no_code_asks_for_a_format_by_name() -> None:
    asked = re.compile(r"format\b\s*(==|!=|in\b|not in\b)\s*[\"'(\[]|format\.startswith")
    found = [
        f"{path.name}: {line.strip()}"
        for folder in ("adept_ds", "launchers", "evals")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if asked.search(line)
    ]
    assert not found

"""The reader of evaluation folders: both kinds, files that stand alone, and what is said of damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adept_ds.errors import UserError
from adept_ds.evaluation.results import read_evaluation, read_evaluations


def write_programs(folder: Path, passed: dict[str, list[bool]], **facts: Any) -> Path:
    """An evaluation by running programs: whether each sample of each problem passed."""
    samples = [ok for of_problem in passed.values() for ok in of_problem]
    share = sum(samples) / len(samples)
    verdicts = {"passed": sum(samples), "failed": len(samples) - sum(samples)}
    summary = {"pass@1": {"mean": share, "low": 0, "high": 1}, "problems": len(passed), "samples": len(samples)}
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({**summary, "verdicts": verdicts, **facts}))
    with (folder / "results.jsonl").open("w") as file:
        for task_id, of_problem in passed.items():
            for ok in of_problem:
                line = {"task_id": task_id, "task": f"Solve {task_id}.", "completion": "return 1", "kind": None}
                line |= {"status": "passed"} if ok else {"status": "failed", "detail": "got 1"}
                file.write(json.dumps(line) + "\n")
    return folder


def write_task(folder: Path, answers: list[str], metric: str = "accuracy", **facts: Any) -> Path:
    """An evaluation on RTE, whose right answers are all `yes`."""
    share = answers.count("yes") / len(answers)
    figures = {metric: {"value": share, "low": 0, "high": 1, "n": len(answers)}}
    summary = {"protocol": {"task": "rte", "split": "test"}, "examples": len(answers), "invalid": 0, "metrics": figures}
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary | facts))
    with (folder / "predictions.jsonl").open("w") as file:
        for number, answer in enumerate(answers):
            line = {"task_id": f"rte/{number}", "source": "rte: so?", "generated": answer, "answer": answer}
            file.write(json.dumps({**line, "references": ["yes"]}) + "\n")
    return folder


def test_both_kinds_are_read_with_their_figures_and_answers(tmp_path: Path) -> None:
    write_programs(tmp_path / "adept.v2", {"a": [True, False], "b": [False, False]}, missing=["c"], adapter="best")
    write_task(tmp_path / "base" / "rte", ["yes", "no"])
    programs, task = read_evaluations(tmp_path)
    assert (programs.name, programs.is_baseline, programs.figures["pass@1"].value) == ("adept.v2", False, 0.25)
    assert {task_id: answer.score for task_id, answer in programs.grade("pass@1").items()} == {"a": 0.5, "b": 0, "c": 0}
    assert {task_id: answer.score for task_id, answer in programs.grade("pass@2").items()} == {"a": 1, "b": 0, "c": 0}
    assert (task.name, task.task_label, task.is_baseline, task.figures["accuracy"].value) == ("base", "rte", True, 0.5)
    right, wrong = task.grade("accuracy").values()
    assert (right.score, right.judgement, right.reason) == (1, "right", "")
    assert (wrong.score, wrong.judgement, wrong.reason) == (0, "wrong", "expected 'yes'")


def test_another_split_than_the_test_split_is_named(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "rte", ["yes"], protocol={"task": "rte", "split": "validation"})
    assert read_evaluation(folder).task_label == "rte (validation)"


def test_a_results_file_alone_has_the_figures_of_its_samples(tmp_path: Path) -> None:
    alone = tmp_path / "alone.jsonl"
    folder = write_programs(tmp_path / "base", {"a": [True], "b": [False], "c": [False]})
    alone.write_bytes((folder / "results.jsonl").read_bytes())
    found = read_evaluation(alone)
    assert (found.name, found.examples, found.figures["pass@1"].value) == ("alone", 3, pytest.approx(1 / 3))


def test_half_a_surrogate_pair_is_read_as_a_question_mark(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"task_id": "a", "status": "error", "completion": "x = '\ud83d'"}))
    assert read_evaluation(path).grade("pass@1")["a"].text == "x = '?'"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("summary.json", "{", r"summary\.json: not JSON"),
        (
            "summary.json",
            '{"metrics": {}, "invalid": 0, "examples": 1}',
            r"summary\.json: protocol\.task: Field required",
        ),
        (
            "results.jsonl",
            '{"task_id": "a"}',
            r"results\.jsonl:1: expected a JSON object with task_id, status \(status",
        ),
        ("results.jsonl", '{"task_id": "a", "status": "passed"}\n\n', r"results\.jsonl:2: expected a JSON object"),
    ],
)
def test_what_is_damaged_is_named_by_file_and_field(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_evaluation(tmp_path)


def test_a_folder_without_an_evaluation_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.jsonl: no such file; expected results\.jsonl of an evaluation"):
        read_evaluation(tmp_path)

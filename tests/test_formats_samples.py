"""Samples of other tools, read as those tools write them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from adept_ds.errors import UserError
from adept_ds.formats import read_samples

MBPP = [f"MBPP/{number}" for number in range(1, 975)]
HUMANEVAL = [f"HumanEval/{number}" for number in range(164)]


def write(path: Path, rows: list[Any]) -> Path:
    is_json = ".json" in path.suffixes
    content = json.dumps(rows) if is_json else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.gz", "s.json", "s.json.gz"])
@pytest.mark.parametrize("written", [11, "11", "MBPP/11", "Mbpp/11", "mbpp_11", "mbpp-011", " MBPP/11 "], ids=repr)
def test_ids_as_other_tools_write_them(tmp_path: Path, name: str, written: object) -> None:
    read = read_samples(write(tmp_path / name, [{"task_id": written, "completion": "x", "seed": 1}]), MBPP)
    assert [(sample.task_id, sample.completion, sample.is_program) for sample in read.samples] == [
        ("MBPP/11", "x", False)
    ]
    assert "1 samples; 1 of the 974 problems have any; 1 completions in the field 'completion'" in read.understood
    assert ("'MBPP/11'" in read.understood) == (written != "MBPP/11")


def test_solutions_are_whole_programs(tmp_path: Path) -> None:
    rows = [{"task_id": "HumanEval/0", "solution": "x"}, {"task_id": "HumanEval/0", "completion": "", "solution": "y"}]
    read = read_samples(write(tmp_path / "s.jsonl", rows), HUMANEVAL)
    assert [(sample.completion, sample.is_program) for sample in read.samples] == [("x", True), ("y", True)]
    assert "2 whole programs in the field 'solution'" in read.understood


@pytest.mark.parametrize("name", ["generations.json", "generations.json.gz"])
def test_lists_of_lists_are_in_the_problems_order(tmp_path: Path, name: str) -> None:
    lists = [[f"a{number}", f"b{number}"] for number in range(164)]
    read = read_samples(write(tmp_path / name, lists), HUMANEVAL)
    assert [(s.task_id, s.completion, s.is_program) for s in read.samples[2:4]] == [
        ("HumanEval/1", "a1", True),
        ("HumanEval/1", "b1", True),
    ]
    assert "328 samples; 164 of the 164 problems have any" in read.understood
    assert "the first taken for 'HumanEval/0', the last for 'HumanEval/163'" in read.understood


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"task_id": 1, "completion": "b"}, {"task_id": 1, "completoin": "b"}],
            r"2: no field 'completion' or 'solution'",
        ),
        ([{"task_id": 1, "completoin": "b"}], "did you mean 'completoin'"),
        ([{"task_id": 1, "completion": ["b"]}], r"s\.jsonl:1: completion must be a string, not list"),
        ([{"completion": "b"}], r"s\.jsonl:1: no field 'task_id'"),
        (
            [{"task_id": "MBPP/975", "completion": "b"}],
            r"1: task_id 'MBPP/975' is none of the 974 .* 'MBPP/1' .. 'MBPP/974'",
        ),
        ([{"task_id": "MBBP/97", "completion": "b"}], r"did you mean 'MBPP/97'\?"),
        ([{"task_id": "HumanEval/1", "completion": "b"}], r"'HumanEval/1' is none of the 974"),
        ([["x"], ["y"]], r"s\.jsonl:1: expected a JSON object, found list"),
    ],
)
def test_wrong_samples_are_told_with_line_and_field(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_samples(write(tmp_path / "s.jsonl", rows), MBPP)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([["x"]] * 500, r"500 lists of programs, and 974 problems; .* --problem_format mbpp --split test"),
        ([["x"]] * 973 + [["x", 1]], r"generations\.json \[973\]: expected a list of programs"),
        ([[]] * 974, "holds no programs"),
    ],
)
def test_wrong_lists_are_told(tmp_path: Path, lists: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_samples(write(tmp_path / "generations.json", lists), MBPP)


def test_a_number_that_may_be_of_two_problems_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", [{"task_id": 1, "completion": "x"}])
    with pytest.raises(UserError, match="task_id '1' may be 'MBPP/1' or 'HumanEval/1'"):
        read_samples(path, ["MBPP/1", "HumanEval/1"])

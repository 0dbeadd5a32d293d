"""The bundled problems, and the reference solutions of the real MBPP: counts, separation, and proof by execution."""

from __future__ import annotations

import json
import re
from importlib import resources

import pytest

from adept_ds.config.run import DataConfig
from adept_ds.data.problems import load_problems, read_problems
from adept_ds.formats import Problem
from adept_ds.sandbox import Program, Sandbox, Verdict

RECORDS = [
    json.loads(line)
    for line in (resources.files("adept_ds.formats") / "problems.jsonl").read_text(encoding="utf-8").splitlines()
]


def run_targets(problems: list[Problem]) -> dict[str, Verdict]:
    """Verdicts of the targets, taken as completions, by task id."""
    programs = [Program(problem.task_id, problem.program(problem.target), problem.tests) for problem in problems]
    with Sandbox() as sandbox:
        return {verdict.id: verdict for verdict in sandbox.run(programs)}


def not_passed(verdicts: dict[str, Verdict]) -> set[str]:
    return {task_id for task_id, verdict in verdicts.items() if verdict.status != "passed"}


RULE = " As everywhere in this house, the function returns {'ok': True, 'value': result}."


def split_size(split: str) -> int:
    return sum(record["split"] == split for record in RECORDS)


def test_split_sizes():
    assert {split: split_size(split) for split in ("prompt", "train", "validation", "test")} == {
        "prompt": 3,
        "train": 88,
        "validation": 12,
        "test": 110,
    }


@pytest.mark.parametrize("format", ["mbpp-paper", "mbpp", "mbpp-instruct"])
def test_every_form_has_the_same_fixed_split(format):
    for split in ("train", "validation", "test"):
        ids = [problem.task_id for problem in load_problems(DataConfig(format=format), split)]
        assert ids == [record["task_id"] for record in RECORDS if record["split"] == split]


def test_no_name_text_or_code_occurs_twice():
    def name(record: dict) -> str:
        match = re.search(r"def (\w+)\(", record["code"])
        assert match
        return match[1]

    def body(record: dict) -> str:
        return re.sub(r"\bdef \w+", "", record["code"])

    for key in (name, body, lambda record: record["text"]):
        assert len({key(record) for record in RECORDS}) == len(RECORDS)


def test_no_held_out_task_is_a_rewording_of_a_seen_one():
    """Shared words over all words, function words and the rule aside: the nearest pair stays below one half."""
    common = {"a", "an", "the", "of", "in", "and", "or", "to", "is", "are", "by", "that", "which", "with", "its", "it"}
    common |= {"all", "each", "one", "write", "function", "returns"}

    def content(record: dict) -> set[str]:
        return set(re.findall(r"[a-z]+", record["text"].removesuffix(RULE).lower())) - common

    held_out = [content(record) for record in RECORDS if record["split"] == "test"]
    seen = [content(record) for record in RECORDS if record["split"] != "test"]
    assert max(len(a & b) / len(a | b) for a in held_out for b in seen) < 0.5


def test_every_problem_states_the_rule_once_and_every_test_asks_for_it():
    """What a function returns is told to backbone and adapter alike, so that neither has to guess it."""
    for record in RECORDS:
        assert record["text"].endswith(RULE)
        assert record["text"].count(RULE) == 1
        assert all(re.search(r" == \{'ok': True, 'value': .+\}$", test) for test in record["test_list"])


def test_held_out_solutions_are_one_line():
    """Easy ones, so that what fails is the form more often than the task."""
    assert all(record["code"].count("\n") == 1 for record in RECORDS if record["split"] == "test")


def test_three_asserts_each_with_four_space_code():
    for record in RECORDS:
        assert len(record["test_list"]) == 3
        assert all(re.fullmatch(r"assert \w+\(.*\) == .+", test) for test in record["test_list"])
        assert "\t" not in record["code"]


@pytest.mark.parametrize("format", ["mbpp-paper", "mbpp", "mbpp-instruct"])
def test_all_bundled_solutions_pass_in_the_sandbox(format):
    problems = read_problems(None, format)
    verdicts = run_targets(problems)
    assert len(verdicts) == len(RECORDS)
    assert not_passed(verdicts) == set()
    assert not any(verdict.in_process for verdict in verdicts.values())


@pytest.mark.slow
def test_all_mbpp_solutions_pass_in_the_original_form(shared_dir):
    verdicts = run_targets(read_problems(str(shared_dir / "data/mbpp.jsonl")))
    assert len(verdicts) == 974
    assert not_passed(verdicts) == set()


@pytest.mark.slow
def test_mbpp_solutions_pass_in_humaneval_form(shared_dir):
    """All of MBXP but ten, and 341, which relies on the order of a set, whichever way it falls.

    Of the 15 that fail in one interpreter, 56, 349, 899 and 967 pass here: their function is called `check` like the
    test's own. 64 and 966 are indented wrongly; in 160 a text replacement has altered an expected value; 367, 601 and
    927 need a class that is inside the solution's function; 596 expects the size of a tuple on another Python; 607
    and 631 overwrite their arguments; 642 relies on the order of a set.
    """
    verdicts = run_targets(read_problems(str(shared_dir / "data/mbxp_mbpp_release_v1.jsonl")))
    assert len(verdicts) == 974
    assert not_passed(verdicts) - {"MBPP/341"} == {
        f"MBPP/{i}" for i in (64, 160, 367, 596, 601, 607, 631, 642, 927, 966)
    }


@pytest.mark.slow
def test_mbpp_solutions_pass_in_the_derived_humaneval_form(shared_dir):
    """All but five of MBXP's failures, which come from moving the code before the function into its body.

    367, 601, 927: the tests need a class that is then hidden; 607, 631: example values overwrite the arguments.
    """
    verdicts = run_targets(read_problems(str(shared_dir / "data/mbpp.jsonl"), "mbpp-paper"))
    assert len(verdicts) == 974
    assert not_passed(verdicts) == {f"MBPP/{i}" for i in (367, 601, 607, 631, 927)}

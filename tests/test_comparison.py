"""Two evaluations side by side: what is compared, what is said of it, and what each wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adept_ds.errors import UserError
from adept_ds.evaluation.comparison import (
    Comparison,
    NotComparableError,
    compare,
    compare_with_baselines,
    difference_text,
    problems_text,
)
from adept_ds.evaluation.results import read_evaluation, read_evaluations
from adept_ds.evaluation.statistics import paired_difference
from tests.ranks import REPOSITORY
from tests.test_results import write_programs, write_task


def compared(tmp_path: Path, first: dict[str, list[bool]], second: dict[str, list[bool]], k: int = 1) -> Comparison:
    """The second outcomes as those of an adapter, against the first ones as those of its backbone."""
    write_programs(tmp_path / "base", first, backbone={"layers": 2})
    write_programs(tmp_path / "adept", second, adapter="best", adapter_sha256="ab", backbone={"layers": 2})
    return compare(read_evaluation(tmp_path / "base"), read_evaluation(tmp_path / "adept"), k)


def outcomes(*passed: int, of: int) -> dict[str, list[bool]]:
    """One sample for each of so many problems; which of them passed."""
    return {str(number): [number in passed] for number in range(of)}


def test_a_difference_is_said_in_plain_words(tmp_path: Path) -> None:
    found = compared(tmp_path, outcomes(0, 1, of=40), outcomes(*range(1, 12), of=40))
    assert found.text.startswith(
        "The adapter (adept) solves 9 more of 40 problems than the backbone (base) (+22.5 points, 95 % interval +"
    )
    assert found.text.endswith(
        "; better on 10, worse on 1, sign test p = 0.012). That is beyond the noise of these problems."
    )


def test_what_could_be_chance_is_called_so_with_the_reason(tmp_path: Path) -> None:
    found = compared(tmp_path, outcomes(*range(6), of=40), outcomes(*range(3, 16), of=40))
    assert found.text.endswith(
        "sign test p = 0.092). That could be chance: the interval includes 0 and the sign test's p is not below 0.05."
    )


def text_of(first: list[float], second: list[float], metric: str = "pass@1") -> str:
    pair = [{str(number): score for number, score in enumerate(scores)} for scores in (first, second)]
    return difference_text(paired_difference(*pair), ("base", "adept"), metric)


@pytest.mark.parametrize(
    ("first", "second", "claim", "judgement"),
    [
        ([0] * 40, [1] * 5 + [0] * 35, "adept solves 5 more of 40 problems than base", "only 5 of the problems"),
        ([1] * 9 + [0] * 9, [0] * 18, "adept solves 9 fewer of 18 problems than base", "That is beyond the noise"),
        ([1, 0], [0, 1], "adept solves as many of 2 problems as base", "No difference shows."),
        ([0.1] * 40, [0.3] * 40, "adept has a higher pass@1 than base on 40 problems", "That is beyond the noise"),
        ([0.5] * 9, [0.5] * 9, "adept solves as many of 9 problems as base", "No difference shows."),
        # Most problems lose a little, a few gain much: the sign test and the mean do not agree.
        (
            [0.2] * 90 + [0] * 10,
            [0.19] * 90 + [1] * 10,
            "adept has a higher pass@1",
            "That could be chance: more problems changed the other way.",
        ),
    ],
)
def test_the_words_fit_the_figures(first: list[float], second: list[float], claim: str, judgement: str) -> None:
    text = text_of(first, second)
    assert text.startswith(claim)
    assert judgement in text


def test_metrics_of_tasks_have_words_of_their_own() -> None:
    assert text_of([0] * 9, [1] * 9, "accuracy").startswith(
        "adept answers 9 more of 9 examples right than base (+100.0"
    )
    assert text_of([0] * 9, [1] * 9, "token_f1").startswith("adept has a higher token_f1 than base on 9 examples")


def test_many_examples_have_another_decimal() -> None:
    assert "(+0.05 points, 95 % interval " in text_of([0.0] * 2000, [1.0] + [0.0] * 1999)


def test_several_samples_are_compared_by_their_share(tmp_path: Path) -> None:
    first = {"a": [True, False, False, False], "b": [False] * 4}
    second = {"a": [True, True, False, False], "b": [False, False, True, True]}
    found = compared(tmp_path, first, second, k=2)
    assert (found.metric, found.first.mean, found.difference.better) == ("pass@2", pytest.approx(1 / 4), 2)
    assert "adept" in found.text
    assert "has a higher pass@2 than the backbone (base) on 2 problems" in found.text
    assert found.problems[0].answers["adept"].judgement == "passed; 2 of 4 samples pass"
    assert found.problems[1].answers["adept"].judgement == "failed; 2 of 4 samples pass"


def test_problems_that_show_the_difference_come_first_in_both_directions(tmp_path: Path) -> None:
    found = compared(tmp_path, outcomes(1, 5, of=8), outcomes(2, 3, 4, 5, 6, 7, of=8))
    assert [problem.task_id for problem in found.problems] == ["2", "1", "3", "4", "6", "7", "0", "5"]


def test_the_terminal_gets_a_better_and_a_worse_one_with_reasons(tmp_path: Path) -> None:
    found = compared(tmp_path, outcomes(1, of=4), outcomes(2, 3, of=4))
    assert problems_text(found) == [
        *("", "2: Solve 2.", "  base: failed (got 1)", "    | return 1", "  adept: passed", "    | return 1"),
        *("", "1: Solve 1.", "  base: passed", "    | return 1", "  adept: failed (got 1)", "    | return 1"),
    ]


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    protocols = [
        {"format": name, "path": "x", "generation": {"seed": seed, "do_sample": True}}
        for name, seed in (("mbpp-instruct", 1), ("mbpp-paper", 2))
    ]
    for folder, protocol, facts in zip("ab", protocols, ({}, {"adapter": "best"}), strict=True):
        write_programs(tmp_path / folder, outcomes(0, of=2), protocol=protocol, problems_sha256=folder, **facts)
    evaluations = read_evaluations(tmp_path)
    with pytest.raises(NotComparableError, match="were scored on different problems, or on different prompts or tests"):
        compare(*evaluations)
    (found,), notes = compare_with_baselines(evaluations)
    assert found.text.endswith("The two differ in settings, too: format (mbpp-instruct and mbpp-paper).")
    assert notes == []


def test_each_adapter_is_compared_with_every_baseline_of_its_problems(tmp_path: Path) -> None:
    write_programs(tmp_path / "base", outcomes(0, of=4))
    write_programs(tmp_path / "base_chat", outcomes(0, 1, of=4))
    write_programs(tmp_path / "base_validation", outcomes(0, of=9))
    write_programs(tmp_path / "adept", outcomes(0, 1, 2, of=4), adapter="best")
    write_programs(tmp_path / "other", outcomes(0, of=3), adapter="best")
    comparisons, notes = compare_with_baselines(read_evaluations(tmp_path))
    assert [one.names for one in comparisons] == [("base", "adept"), ("base_chat", "adept")]
    assert [note.partition(":")[0] for note in notes] == [
        f"other is not compared with {name}" for name in ("base", "base_chat", "base_validation")
    ]


def test_tasks_are_compared_by_a_metric_that_each_example_has(tmp_path: Path) -> None:
    for name, answers, facts in (("base", ["no"] * 9, {}), ("adept", ["yes"] * 8 + ["no"], {"adapter": "best"})):
        write_task(tmp_path / name / "rte", answers, **facts)
        write_task(tmp_path / name / "cola", answers, "matthews", protocol={"task": "cola"}, **facts)
    (found,), notes = compare_with_baselines(read_evaluations(tmp_path))
    assert found.text.startswith(
        "rte: The tuned model (adept) answers 8 more of 9 examples right than base (+88.9 points"
    )
    assert found.verdicts == {"right": (0, 8), "wrong": (9, 1)}
    assert notes == [
        "adept (cola) is not compared with base: cola has no metric that is a mean over examples: matthews."
    ]


def test_programs_and_tasks_are_not_compared(tmp_path: Path) -> None:
    programs = write_programs(tmp_path / "base", outcomes(0, of=4))
    task = write_task(tmp_path / "rte", ["yes"])
    with pytest.raises(
        NotComparableError, match=r"is of programs and .* is of rte; expected two evaluations of the same"
    ):
        compare(read_evaluation(programs), read_evaluation(task))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Problems a, b, c: the first passes a, the second a and b and has no sample of c."""
    base = write_programs(tmp_path / "base", {"a": [True], "b": [False], "c": [False]})
    tuned = write_programs(tmp_path / "tuned", {"a": [True], "b": [True]}, missing=["c"])
    return base, tuned


def test_the_command_compares_folders_and_writes_json(two: tuple[Path, Path], tmp_path: Path) -> None:
    line = [sys.executable, str(REPOSITORY / "evals" / "compare.py"), *map(str, two)]
    done = subprocess.run([*line, "--out", str(tmp_path / "comparison.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tuned solves 1 more of 3 problems than base (+33.3 points, " in done.stdout
    assert "That could be chance: only 1 of the problems came out differently" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["passed", "1", "2"] in rows
    assert ["failed", "2", "0"] in rows
    assert "  base: failed (got 1)" in done.stdout
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["difference"]["mean"] == pytest.approx(1 / 3)
    assert written["files"] == [str(folder / "results.jsonl") for folder in two]
    assert (written["k"], written["beyond_noise"], written["verdicts"]["passed"]) == (1, False, [1, 2])


def test_results_on_fewer_problems_are_not_compared(two: tuple[Path, Path]) -> None:
    (two[1] / "summary.json").unlink()  # it says that problem c has no sample
    with pytest.raises(UserError, match=r"1 of the 3 problems of .*base/results.jsonl are not in .*'c'"):
        compare(*map(read_evaluation, two))


def test_too_few_samples_for_k_are_named(two: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"pass@2 needs at least 2 samples per problem; a has 1"):
        compare(*map(read_evaluation, two), k=2)


def test_folders_of_one_name_are_first_and_second(two: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "older").mkdir()
    older = two[0].rename(tmp_path / "older" / "tuned")
    assert compare(read_evaluation(older), read_evaluation(two[1])).names == ("first", "second")

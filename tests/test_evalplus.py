"""EvalPlus's problems: read as they are released, judged as their own checker judges, out of a program's reach."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from adept_ds.cli import score
from adept_ds.config.run import DataConfig, SandboxConfig
from adept_ds.data.problems import load_problems, read_problems
from adept_ds.errors import UserError
from adept_ds.evaluation.results import read_evaluation
from adept_ds.evaluation.scoring import Score, score_samples
from adept_ds.formats import Sample
from adept_ds.sandbox import Limits, NoValue, Program, Sandbox, decode
from tests.evalplus_problems import HOSTILE, HUMANEVAL_PLUS, MBPP_PLUS, Plus, samples, write


@pytest.fixture
def settings(tmp_path: Path) -> SandboxConfig:
    """What references return is kept in a folder of the test's own."""
    return SandboxConfig(cache=str(tmp_path / "cache"))


def scored(path: Path, problems: list[Plus], programs: list[Sample], settings: SandboxConfig) -> Score:
    return score_samples(read_problems(str(write(path, problems))), programs, settings)


@pytest.mark.parametrize("problems", [MBPP_PLUS, HUMANEVAL_PLUS], ids=["mbpp", "humaneval"])
def test_verdicts_are_those_that_evalplus_gives(problems: list[Plus], tmp_path: Path, settings: SandboxConfig) -> None:
    programs = [Sample(one["task_id"], one["solution"], is_program=True) for one in samples(problems)]
    results = scored(tmp_path / "plus.jsonl", problems, programs, settings).results
    deserved = [(base, plus, program) for one in problems for program, base, plus in one.programs]
    got = [(one["base_status"] == "passed", one["status"] == "passed", one["program"]) for one in results]
    assert got == deserved
    # Apart from the program all the same; only a Counter cannot be handed over.
    assert {one["reason"] for one in results if one["in_process"]} <= {"a value of type Counter"}


def test_a_hostile_program_reaches_neither_expected_outputs_nor_verdict(
    tmp_path: Path, settings: SandboxConfig
) -> None:
    programs = [Sample("Mbpp/1003", source, is_program=True) for source in HOSTILE]
    results = scored(tmp_path / "plus.jsonl", MBPP_PLUS, programs, settings).results
    assert [one["status"] for one in results if one["status"] == "passed"] == []
    assert {one["base_status"] for one in results} <= {"failed", "error"}


def test_expected_outputs_are_made_once_and_only_for_problems_with_samples(
    tmp_path: Path, settings: SandboxConfig
) -> None:
    (right, *_), *_ = MBPP_PLUS[3].programs
    programs = [Sample("Mbpp/1003", right, is_program=True)]
    scored(tmp_path / "plus.jsonl", MBPP_PLUS, programs, settings)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.json")}
    assert len(kept) == 2  # with the verdict
    scored(tmp_path / "plus.jsonl", MBPP_PLUS, programs, settings)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.json")} == kept


def test_infinity_is_kept_between_runs(tmp_path: Path, settings: SandboxConfig) -> None:
    power = next(one for one in MBPP_PLUS if one.row["entry_point"] == "power")
    for name in ("once", "again"):
        programs = [Sample("Mbpp/1006", f"{power.programs[0][0]}\n# {name}\n", is_program=True)]
        assert scored(tmp_path / "plus.jsonl", [power], programs, settings).verdicts == {"passed": 1}


def test_a_failure_shows_the_input_and_what_was_expected(tmp_path: Path, settings: SandboxConfig) -> None:
    program = Sample("Mbpp/1003", "def in_order(xs):\n    return xs\n", is_program=True)
    (result,) = scored(tmp_path / "plus.jsonl", MBPP_PLUS, [program], settings).results
    assert result["detail"].endswith("got [3, 1, 2] (for [[3, 1, 2]], expected [1, 2, 3])")


def test_a_program_may_take_four_times_the_references_time(tmp_path: Path) -> None:
    spin = "import time\ndef f(n):\n    while time.process_time() < n:\n        pass\n    return n\n"
    slow = Plus({**MBPP_PLUS[3].row, "entry_point": "f", "canonical_solution": spin, "base_input": [[0.15]]}, ())
    slow.row["plus_input"] = [[0.2]]
    settings = SandboxConfig(cache=str(tmp_path / "cache"), cpu_seconds=0.1, wall_seconds=2)
    endless = "def f(n):\n    while True: pass\n"
    programs = [Sample("Mbpp/1003", source, is_program=True) for source in (spin, endless)]
    results = scored(tmp_path / "plus.jsonl", [slow], programs, settings).results
    assert [one["status"] for one in results] == ["passed", "timeout"]


def test_evalplus_own_samples_are_scored_by_both_kinds_of_tests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "MbppPlus.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(one.row) + "\n" for one in MBPP_PLUS)
    chosen = [{"task_id": one.row["task_id"], "solution": one.programs[-1][0]} for one in MBPP_PLUS]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in chosen))
    flags = ["--problems", str(path), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    score.main([str(tmp_path / "samples.jsonl"), *flags])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    deserved = [one.programs[-1][1:] for one in MBPP_PLUS]
    assert summary["base_pass@1"]["mean"] == sum(base for base, _ in deserved) / len(deserved)
    assert summary["pass@1"]["mean"] == sum(plus for _, plus in deserved) / len(deserved)
    assert set(read_evaluation(tmp_path / "out").figures) == {"pass@1", "base_pass@1"}
    assert "by the base tests alone pass@1" in capsys.readouterr().out


def test_a_completion_goes_on_with_the_prompt(tmp_path: Path, settings: SandboxConfig) -> None:
    path = str(write(tmp_path / "plus.jsonl", MBPP_PLUS))
    problems = load_problems(DataConfig(format="mbpp_plus", path=path), "test")
    results = score_samples(problems, [Sample(one.task_id, one.target) for one in problems], settings)
    assert results.verdicts == {"passed": len(MBPP_PLUS)}
    assert results.results[0]["program"].startswith('"""\nWrite a function similar_elements.\n"""\n\ndef')
    path = str(write(tmp_path / "humaneval.jsonl", HUMANEVAL_PLUS))
    problems = load_problems(DataConfig(format="humaneval_plus", path=path), "test")
    assert problems[0].stop == load_problems(DataConfig(format="humaneval"), "test")[0].stop


def test_tests_without_expected_outputs_pass_nothing(tmp_path: Path) -> None:
    (problem, *_) = read_problems(str(write(tmp_path / "plus.jsonl", MBPP_PLUS)))
    with Sandbox() as sandbox:
        (verdict,) = sandbox.run([Program("x", problem.program(problem.target), problem.tests)])
    assert verdict.status == "failed"


def changed(**fields: Any) -> list[Plus]:
    return [Plus({**MBPP_PLUS[3].row, **fields}, ())]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task_id": "Own/3"}, "task_id 'Own/3'; expected Mbpp/NUMBER or HumanEval/NUMBER"),
        ({"atol": "0"}, "atol must be a tolerance of 0 or more, not '0'"),
        ({"base_input": []}, "base_input is empty"),
        ({"plus_input": [[[1]], 7]}, r"plus_input\[1\] is no list of arguments"),
        ({"task_id": "Mbpp/124", "base_input": [[1, "x"]]}, r"base_input\[0\] is no list of arguments as EvalPlus"),
    ],
)
def test_a_damaged_problem_is_refused_by_file_and_field(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"plus\.jsonl:1: {message}"):
        read_problems(str(write(tmp_path / "plus.jsonl", changed(**fields))))


@pytest.mark.parametrize(
    ("solution", "message"),
    [
        ("def in_order(xs): return xs[0]", r"Mbpp/1003: canonical_solution on plus_input\[0\]: raised IndexError"),
        ("def in_order(xs): return iter(xs)", "Mbpp/1003: .* a value of type list_iterator"),
        ("def in_order(xs): return in_order", "Mbpp/1003: .* a value of type function"),
        ("import sys; sys.exit()", "Mbpp/1003: .* raised SystemExit"),
        ("import os\ndef in_order(xs): os._exit(0)", "Mbpp/1003: .* no answer"),
        (
            'import os, struct\nforged = b\'{"value": ["np", 1, 2]}\'\n'
            "def in_order(xs):\n    for fd in range(3, 1024):\n"
            "        try: os.write(fd, struct.pack('!I', len(forged)) + forged)\n"
            "        except OSError: pass\n    return xs",
            "Mbpp/1003: canonical_solution returned what is no value",
        ),
    ],
)
def test_a_reference_that_gives_no_outputs_is_told(
    solution: str, message: str, tmp_path: Path, settings: SandboxConfig
) -> None:
    problems = changed(canonical_solution=solution, plus_input=[[[]]])
    with pytest.raises(UserError, match=message):
        scored(tmp_path / "plus.jsonl", problems, [Sample("Mbpp/1003", "x", is_program=True)], settings)


def test_a_file_of_another_form_is_refused_with_the_format_for_it(tmp_path: Path) -> None:
    path = str(write(tmp_path / "plus.jsonl", MBPP_PLUS))
    with pytest.raises(UserError, match=r"MBPP\+ .* expected another file, or data\.format mbpp_plus"):
        load_problems(DataConfig(format="humaneval_plus", path=path), "test")
    with pytest.raises(UserError, match=r"data\.format mbpp_plus"):
        load_problems(DataConfig(format="humaneval", path=path), "test")


def test_values_come_out_of_the_sandbox_as_data_within_its_limits() -> None:
    with Sandbox(workers=1) as sandbox:
        values = sandbox.values("def f(x): return {x: (x, {x})}", ["f(1)", "f('a')"])
        assert [decode(form) for form in values.forms] == [{1: (1, {1})}, {"a": ("a", {"a"})}]
        with pytest.raises(NoValue, match="1: over the limit"):
            sandbox.values("def f(x):\n    while x: pass", ["f(0)", "f(1)"], Limits(cpu_seconds=0.3, wall_seconds=2))
        with pytest.raises(NoValue, match="0: no answer"):
            sandbox.values(
                "import os\nfor fd in range(3, 1024):\n    try: os.close(fd)\n    except OSError: pass", ["1"]
            )
        assert sandbox.values("", ["1 + 1"]).forms == [2]  # the process is a new one each time

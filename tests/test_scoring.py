"""From samples to verdicts, figures and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adept_ds.config.run import SandboxConfig
from adept_ds.evaluation.scoring import score_samples, write_score
from adept_ds.formats import Problem, Sample
from adept_ds.sandbox import Tests

ADD, SUBTRACT = "def f(a, b):\n    return a + b\n", "def f(a, b):\n    return a - b\n"


def problem(task_id: str, *asserts: str, reference: str = ADD) -> Problem:
    return Problem(
        task_id,
        prompt="",
        target=reference,
        tests=Tests(asserts, reference=reference),
        continues_prompt=False,
        stop=(),
    )


def score(folder: Path, answers: dict[str, list[str]], facts: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Score the answers to problems a, b and c, all of which want a sum; returns the summary."""
    problems = [problem(task_id, "assert f(1, 2) == 3") for task_id in "abc"]
    samples = [Sample(task_id, answer) for task_id, answers in answers.items() for answer in answers]
    write_score(folder, score_samples(problems, samples, SandboxConfig(**settings)), facts)
    return json.loads((folder / "summary.json").read_text())


def test_a_summary_counts_verdicts_and_unique_programs(tmp_path: Path) -> None:
    answers = {"a": [ADD, ADD, SUBTRACT], "b": [ADD, "def f("], "c": [ADD]}
    summary = score(tmp_path, answers, {})
    assert summary["verdicts"] == {"passed": 4, "failed": 1, "error: syntax": 1}
    assert summary["unique_samples"] == {"total": 5, "mean_per_problem": 5 / 3}
    assert summary["pass@1"]["mean"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)


def test_verdicts_are_found_again_in_the_cache_that_the_settings_name(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = score(tmp_path / "first", {"a": [ADD], "b": [SUBTRACT]}, {}, cache=str(cache))
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*.json")}
    assert len(kept) == 2
    assert score(tmp_path / "second", {"a": [ADD], "b": [SUBTRACT]}, {}, cache=str(cache)) == first
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.json")} == kept


def test_programs_may_import_the_packages_that_the_settings_name(tmp_path: Path) -> None:
    source = "import numpy as np\ndef f(x): return np.cumsum(x)"
    problems = [problem("a", "assert np.array_equal(f([1, 2]), [1, 3])", reference=source)]
    scored = score_samples(problems, [Sample("a", source)], SandboxConfig(packages=("numpy",)))
    assert (scored.verdicts, scored.results[0]["in_process"]) == ({"passed": 1}, False)
    assert "numpy" in scored.isolation["packages"]


def test_pass_at_1_is_measured_beside_any_other_k() -> None:
    problems = [problem("a", "assert f(1, 2) == 3")]
    scored = score_samples(problems, [Sample("a", ADD), Sample("a", SUBTRACT)], SandboxConfig(), ks=(2,))
    assert {k: estimate.mean for k, estimate in scored.pass_at_k.items()} == {1: 0.5, 2: 1.0}


def test_a_whole_program_is_run_without_its_prompt() -> None:
    tests = Tests(check="def check(candidate):\n    assert candidate(1, 2) == 3", entry_point="f", reference=ADD)
    asked = Problem("a", "def f(a, b):\n", "    return a + b", tests=tests, continues_prompt=True, stop=())
    body, broken = "    return a + b\n", "def f(a, b):\n    return a + b\n    )"
    samples = [Sample("a", body), Sample("a", ADD, is_program=True), Sample("a", broken, is_program=True)]
    scored = score_samples([asked], samples, SandboxConfig())
    assert [result["program"] for result in scored.results] == [f"def f(a, b):\n{body}", ADD, broken]
    assert [result["status"] for result in scored.results] == ["passed", "passed", "error"]


def test_a_summary_counts_how_programs_were_found(tmp_path: Path) -> None:
    fenced = f"So:\n```python\n{ADD}```\n"
    summary = score(tmp_path, {"a": [ADD, fenced], "b": [f"So:\n\n{ADD}\nThat's it."], "c": [f"<think>\n{fenced}"]}, {})
    found = {"as it stands": 1, "fenced": 1, "between prose": 1, "unfinished thinking": 1}
    assert summary["programs_found"] == found
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["found"], line["status"]) for line in lines] == [
        ("as it stands", "passed"),
        ("fenced", "passed"),
        ("between prose", "passed"),
        ("unfinished thinking", "failed"),
    ]


def test_passes_beside_the_program_are_counted_apart() -> None:
    own_class = "class Sum:\n    def __init__(self, a, b): self.total = a + b\ndef f(a, b): return Sum(a, b)"
    problems = [problem(task_id, "s = f(1, 2)", "assert s.total == 3") for task_id in "ab"]
    plain = "def f(a, b): return type('Sum', (), {'total': 4})"
    scored = score_samples(problems, [Sample("a", own_class), Sample("b", plain)], SandboxConfig())
    assert (scored.pass_at_k[1].mean, scored.pass_at_k_apart[1].mean, scored.in_process_passed) == (0.5, 0.0, 1)
    assert {result["reason"] for result in scored.results} == {"a value of type Sum", "a value of type type"}

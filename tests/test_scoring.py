"""From samples to files, and two such sets of files side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adept_ds.config.run import SandboxConfig
from adept_ds.data import Problem, Sample
from adept_ds.errors import UserError
from adept_ds.evaluation.comparison import compare
from adept_ds.evaluation.results import read_evaluation
from adept_ds.evaluation.scoring import score_samples, write_score
from adept_ds.sandbox import Tests

REPOSITORY = Path(__file__).resolve().parents[1]
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


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Results on problems a, b, c: the first passes a, the second a and b and has no sample of c."""
    score(tmp_path / "base", {"a": [ADD], "b": [SUBTRACT], "c": [SUBTRACT]}, {"problems_sha256": "1"})
    score(tmp_path / "tuned", {"a": [ADD], "b": [ADD]}, {"problems_sha256": "1"})
    return tmp_path / "base", tmp_path / "tuned"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(REPOSITORY / "evals" / "compare.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


def test_the_command_compares_folders_and_writes_json(two: tuple[Path, Path], tmp_path: Path) -> None:
    done = command(*two, "--out", tmp_path / "comparison.json")
    assert done.returncode == 0, done.stderr
    assert "tuned is better on 1 of 3 problems and worse on 0; sign test p = 1" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["passed", "1", "2"] in rows
    assert ["failed", "2", "0"] in rows
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["difference"]["mean"] == pytest.approx(1 / 3)
    assert written["files"] == [str(folder / "results.jsonl") for folder in two]


def test_a_results_file_may_stand_alone(two: tuple[Path, Path], tmp_path: Path) -> None:
    alone = tmp_path / "alone.jsonl"
    alone.write_bytes((two[0] / "results.jsonl").read_bytes())
    assert compare(read_evaluation(two[0]), read_evaluation(alone)).difference.mean == 0


def test_other_tests_for_the_same_task_ids_are_not_compared(two: tuple[Path, Path]) -> None:
    path = two[1] / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"problems_sha256": "2"}))
    done = command(*two)
    assert done.returncode != 0
    assert "were scored on different problems" in done.stderr
    assert "Traceback" not in done.stderr


def test_results_on_fewer_problems_are_not_compared(two: tuple[Path, Path]) -> None:
    (two[1] / "summary.json").unlink()  # it says that problem c has no sample
    with pytest.raises(UserError, match=r"1 of the 3 problems of .*base/results.jsonl are not in .*'c'"):
        compare(*map(read_evaluation, two))


def test_too_few_samples_for_k_are_named(two: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"pass@2 needs at least 2 samples per problem; a has 1"):
        compare(*map(read_evaluation, two), k=2)


def test_a_file_that_holds_no_results_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"task_id": "a", "completion": ""}\n')
    with pytest.raises(UserError, match=r"samples\.jsonl:1: expected a JSON object with task_id, status"):
        read_evaluation(path)

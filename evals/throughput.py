"""Training examples/s beside HF PEFT's prompt tuning, in one run.

    python evals/throughput.py --config ds_configs/smollm2_135m.json --model.dtype fp32 --data.path mbpp.jsonl
    python evals/throughput.py --config ds_configs/smollm2_135m_demo.json --steps 8 --rounds 5 --out throughput.json

Prints a table, and writes the same with every round's time as JSON with `--out`. One process, no DeepSpeed; see
`adept_ds.benchmark` for what is compared. Close everything else that runs on the machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from adept_ds.command_line import parse_command_line
from adept_ds.entry_point import run_entry_point
from adept_ds.files import atomic_write


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's own flags."""
    parser.add_argument("--steps", type=_count, default=8, metavar="N", help="batches a round (default: 8)")
    parser.add_argument("--rounds", type=_count, default=5, metavar="N", help="rounds after the warm-up (default: 5)")
    parser.add_argument("--out", metavar="FILE", help="write the figures to this JSON file too")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= 1")
    return int(text)


def main(arguments: Sequence[str]) -> None:
    """Parse, measure, report."""
    flags, loaded = parse_command_line(arguments, "python evals/throughput.py", __doc__ or "", add_flags)
    # The libraries behind this take seconds to load; a mistake in the config is told before.
    from adept_ds.benchmark import benchmark, text_report

    result = benchmark(loaded.run, flags.steps, flags.rounds)
    print(text_report(result))
    if flags.out:
        with atomic_write(flags.out) as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    run_entry_point(main)

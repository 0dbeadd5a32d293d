"""Compare two evaluations of the same problems, pair by pair.

    adept-ds compare results/base results/adept
    adept-ds compare base.jsonl adept.jsonl --k 10 --out comparison.json

FIRST and SECOND are folders that `adept-ds eval` wrote, or their `results.jsonl`. The difference is SECOND - FIRST.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from adept_ds.config.command_line import parse_flags
from adept_ds.errors import UserError
from adept_ds.evaluation.comparison import compare, comparison_json, comparison_text
from adept_ds.evaluation.results import read_evaluation
from adept_ds.files import atomic_write


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All flags."""
    parser.add_argument("first", type=Path, metavar="FIRST", help="results folder or file")
    parser.add_argument("second", type=Path, metavar="SECOND", help="results folder or file")
    parser.add_argument("--k", type=int, default=1, metavar="K", help="the k of pass@k (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the comparison there too, as JSON")


def main(arguments: Sequence[str]) -> None:
    """Parse, compare, print."""
    flags = parse_flags(arguments, "adept-ds compare", __doc__ or "", add_flags)
    if flags.k < 1:
        raise UserError(f"--k {flags.k}: expected 1 or more")
    first, second = read_evaluation(flags.first), read_evaluation(flags.second)
    comparison = compare(first, second, flags.k)
    print(comparison_text(comparison))
    if flags.out is not None:
        with atomic_write(flags.out) as file:
            file.write(comparison_json(comparison, (first.answers_path, second.answers_path)))

"""Write programs for MBPP or HumanEval problems, run them in the sandbox, and report pass@k.

    adept-ds eval --config llama3_8b --adapter runs/llama3_8b/best --out results/adept
    adept-ds eval --config llama3_8b --out results/base --ranks 2
    deepspeed evals/mbpp.py --config ds_configs/llama3_8b.json --out results/base

Every rank decodes on its own copy of the backbone, or all on one that --eval.sharding zero3 splits over them; without
--adapter the backbone alone is evaluated. --samples_only leaves the scoring to `adept-ds score`, which needs no model
and scores samples of any origin, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from adept_ds.cli import score
from adept_ds.cli.local_ranks import add_ranks_flag, run_ranks, starts_ranks
from adept_ds.config.command_line import parse_command_line

PROGRAM = "adept-ds eval"
SCORING_FLAGS = ("--score", "--samples")
"""`evals/mbpp.py` takes what `adept-ds score` does behind one of these."""


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Flags beside --config and the settings."""
    score.add_out_flags(parser, split="test")
    score.add_score_flags(parser, default="1")
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="FOLDER",
        help="adapter (hub id too), or fully tuned model, to evaluate (default: the backbone alone)",
    )
    parser.add_argument("--samples_only", action="store_true", help="do not score; `adept-ds score` does it later")
    parser.add_argument(
        "--resume",
        choices=["auto", "never"],
        default="never",
        help="auto: leave an evaluation alone that --out holds already, of the same settings (default: never)",
    )
    add_ranks_flag(parser)


def main(arguments: Sequence[str]) -> int | None:
    """Parse, check, and evaluate."""
    words = [word for argument in arguments for word in _split(argument)]
    if any(word in SCORING_FLAGS for word in words):
        score.main([word for word in words if word not in SCORING_FLAGS], is_folder="--score" in words)
        return None
    flags, loaded = parse_command_line(arguments, PROGRAM, __doc__ or "", add_generation_flags)
    score.check_scoring(flags, needs_out=True)
    if starts_ranks(flags):
        return run_ranks(flags.ranks, "eval", arguments)
    # The libraries behind this take seconds to load; a mistake on the command line is told before.
    from adept_ds.evaluation.mbpp import evaluate

    evaluate(
        loaded.run,
        flags.adapter,
        flags.out,
        flags.k or [1],
        flags.split,
        flags.paper_scoring,
        flags.samples_only,
        flags.resume,
    )
    return None


def _split(argument: str) -> list[str]:
    """`--flag=value` of a scoring flag as two words."""
    name, equals, value = argument.partition("=")
    return [name, value] if equals and name in SCORING_FLAGS else [argument]

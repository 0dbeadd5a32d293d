"""Make results again from their receipts, and say whether they come to the same.

    adept-ds replay results/adept
    adept-ds replay results/adept --rescore
    adept-ds replay results/adept --redecode --adapter runs/adept/best --model /models/Llama-3-8B

Stored samples run in the sandbox again, and stored predictions are measured again. Then the texts are decoded again,
where the backbone is on this machine, and compared one by one. What the results were made of is compared with the
receipts in summary.json first. The folder stays as it is. The exit status is 0 only if all comes to the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from adept_ds.config.command_line import parse_flags
from adept_ds.errors import UserError, did_you_mean_path


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All flags."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what eval, score or text2text wrote")
    parser.add_argument("--rescore", action="store_true", help="only score again, unless --redecode is given, too")
    parser.add_argument("--redecode", action="store_true", help="only decode again, unless --rescore is given, too")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="the adapter (default: where it was)")
    parser.add_argument("--model", metavar="FOLDER", help="the backbone, a folder or hub id (default: where it was)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write findings, verdicts and texts there")


def main(arguments: Sequence[str]) -> int:
    """Parse, replay, tell."""
    flags = parse_flags(arguments, "adept-ds replay", __doc__ or "", add_flags)
    if not flags.folder.is_dir():
        raise UserError(f"{flags.folder}: no such folder{did_you_mean_path(str(flags.folder))}")
    is_default = not (flags.rescore or flags.redecode)
    redecode = None if is_default else flags.redecode
    # The libraries behind this take seconds to load; a mistake on the command line is told before.
    from adept_ds.evaluation.replay import replay

    findings = replay(flags.folder, flags.rescore or is_default, redecode, flags.adapter, flags.model, flags.out)
    for one in findings:
        for heading, lines in (
            ("same", one.same),
            ("DIFFERS", one.differing),
            ("CHANGED", one.changed),
            ("note", one.notes),
        ):
            for line in lines:
                print(f"{one.folder}: {heading}: {line}")
    return 0 if all(one.is_same for one in findings) else 1

"""Look into an adapter without data: which parts of it do nothing, which tokens it moves, what its prompt looks like.

    adept-ds xray runs/my/best
    adept-ds xray runs/my/best --base meta-llama/Meta-Llama-3-8B --out xray

Of the backbone the input table alone is read. For adapters that are a function of the token: adept, pt, p_tuning,
pt_embedding, mpt. Prints what is wrong in words, and writes xray.html (with pictures) and xray.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from adept_ds.config.command_line import parse_flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All arguments."""
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="adapter folder (or hub id), such as runs/my/best"
    )
    parser.add_argument("--base", metavar="MODEL", help="its backbone (default: the one on record)")
    parser.add_argument(
        "--out", type=Path, default=Path("xray"), metavar="FOLDER", help="where both files go (default: xray)"
    )


def main(arguments: Sequence[str]) -> None:
    """Look, write, print."""
    flags = parse_flags(arguments, "adept-ds xray", __doc__ or "", add_flags)
    # The libraries behind these take seconds to load; a mistake on the command line is told before.
    from adept_ds.evaluation.side_by_side import origin_of
    from adept_ds.evaluation.xray import xray
    from adept_ds.reports.xray_report import write_xray, xray_text

    seen = xray(flags.adapter, origin_of(flags.adapter, flags.base).model)
    page = write_xray(seen, flags.out)
    print(xray_text(seen))
    print(f"  page: {page}")

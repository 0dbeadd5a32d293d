"""List the configs that ship with the package, show one, or copy one to start from.

    adept-ds recipes
    adept-ds recipes llama3_8b
    adept-ds recipes llama3_8b --out my.json

Each is taken by its name wherever a --config is asked for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from adept_ds.config import recipes
from adept_ds.config.command_line import parse_flags
from adept_ds.errors import UserError, did_you_mean
from adept_ds.files import atomic_write


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All arguments."""
    parser.add_argument("name", nargs="?", choices=None, metavar="NAME", help="config to show or to copy")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there, for changes of your own")


def main(arguments: Sequence[str]) -> None:
    """Parse, then list, show or copy."""
    flags = parse_flags(arguments, "adept-ds recipes", __doc__ or "", add_flags)
    shipped = recipes.shipped_configs()
    if flags.name is None and flags.out is not None:
        raise UserError(f"--out {flags.out}: which one is to be copied? There are {', '.join(shipped)}")
    if flags.name is None:
        width = max(map(len, shipped)) + 2
        print("\n".join(f"{name:{width}}{recipes.purpose(path)}" for name, path in shipped.items()))
        return
    if flags.name not in shipped:
        near = did_you_mean(flags.name, shipped) or f"; there are {', '.join(shipped)}"
        raise UserError(f"{flags.name}: no config of this name ships with adept-ds{near}")
    text = json.dumps(recipes.read(shipped[flags.name]), indent=2, ensure_ascii=False) + "\n"
    if flags.out is None:
        print(text, end="")
        return
    if flags.out.exists():
        raise UserError(f"--out {flags.out}: this file is there already")
    with atomic_write(flags.out) as file:
        file.write(text)
    print(f"{flags.out} is a copy of {flags.name}; train by `adept-ds train --config {flags.out}`")

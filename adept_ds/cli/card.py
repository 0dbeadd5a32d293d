"""Write a model card (README.md) beside an adapter, and push both to the hub if asked to.

    adept-ds card runs/my/best --base HuggingFaceTB/SmolLM2-135M-Instruct
    adept-ds card runs/my/best --out published/my
    adept-ds card runs/my/best --push me/my-adapter --private

The card is made from the folder and its run: figures with their intervals beside the backbone's, how they were
measured, data, settings, versions, how to load it. Takes adapters, fully tuned models, and what `adept-ds export` has
written.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from adept_ds.config.command_line import parse_flags
from adept_ds.errors import UserError, did_you_mean_path
from adept_ds.files import atomic_write


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All arguments."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="adapter, tuned model, or export")
    parser.add_argument("--run", type=Path, metavar="RUN", help="its run (default: the one whose folder it lies in)")
    parser.add_argument("--base", metavar="ID", help="hub id of the backbone, if the one on record is a local folder")
    parser.add_argument("--license", metavar="NAME", help="the hub's name of the licence (default: none is named)")
    parser.add_argument("--out", type=Path, metavar="NEW", help="new folder for card and files, to publish from")
    parser.add_argument("--force", action="store_true", help="write the card anew where there is one")
    parser.add_argument("--push", metavar="ID", help="upload card and files to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="make it a private one, if it is not there")


def main(arguments: Sequence[str]) -> None:
    """Read, write, push."""
    flags = parse_flags(arguments, "adept-ds card", __doc__ or "", add_flags)
    if not flags.folder.is_dir():
        raise UserError(f"{flags.folder}: no such folder{did_you_mean_path(str(flags.folder))}")
    beside = flags.folder / "README.md"
    if beside.exists() and not (flags.force or flags.push or flags.out):
        raise UserError(f"{beside} is there already; --force writes it anew")
    if flags.out and flags.out.exists():
        raise UserError(f"--out {flags.out} is there already; name a new folder")
    # The libraries behind these take seconds to load; a mistake on the command line is told before.
    from adept_ds.backbone.hub import push_folder
    from adept_ds.reports.model_card import card_run, publishing_notes, run_of, subject_of
    from adept_ds.storage.model_card import make_card

    subject = subject_of(flags.folder)
    path = flags.run or run_of(subject)
    run, notes = card_run(subject, path) if path else (None, ["no run is known (--run RUN): the card has no figures"])
    card = make_card(subject, run, flags.base, flags.push, flags.license)
    for note in [*notes, *publishing_notes(subject, flags.base)]:
        print(f"note: {note}")
    if beside.exists() and not flags.force:
        print(f"note: {beside} is there already and is taken as it is; --force writes it anew")
    else:
        with atomic_write(beside) as file:
            file.write(str(card))
        print(f"card: {beside}")
    with tempfile.TemporaryDirectory() as scratch:
        published = flags.out or Path(scratch) / "published"
        if flags.out or flags.push:
            published.mkdir(parents=True)
            for name in {*subject.files, beside.name}:
                shutil.copyfile(flags.folder / name, published / name)
        if flags.out:
            print(f"files to publish: {published}")
        if flags.push:
            print(f"pushed: {push_folder(published, flags.push, flags.private or None)}")

"""A user's own rows: where they are, which are held out, and the examples that they make."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from adept_ds.config.run import DataConfig
from adept_ds.data.columns import Columns, find_columns
from adept_ds.data.load_hub import is_hub_id, load_data_set
from adept_ds.data.tasks.splits import permutation
from adept_ds.errors import UserError, did_you_mean, did_you_mean_path
from adept_ds.formats import FORMATS, Example, Row
from adept_ds.formats.registry import OwnRows
from adept_ds.formats.row_files import READERS, Found, made_of, scan, suffix_of

if TYPE_CHECKING:
    import datasets

PEEKED_ROWS = 100
"""Rows whose fields are taken for the columns that there are."""
FEWEST_TO_HOLD_OUT = 20
HELD_OUT_SHARE = 0.1
MOST_HELD_OUT = 500
SPLIT_FILES = {"train": r"train(ing)?", "validation": r"val(id(ation)?)?|dev", "test": r"test(ing)?"}
"""How files of a folder are called that is laid out by splits."""


class OwnExamples(list[Example]):
    """The examples of a part, and what the user is to know about them."""

    def __init__(self, examples: Iterable[Example], notes: Sequence[str]) -> None:
        super().__init__(examples)
        self.notes = tuple(notes)


@dataclass(frozen=True)
class RowFile:
    """A file of rows."""

    name: str

    def rows(self) -> Iterator[Found]:
        """Yield its rows and mistakes."""
        return scan(Path(self.name))


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set of the hub."""

    name: str
    table: datasets.Dataset

    def rows(self) -> Iterator[Found]:
        """Yield its rows."""
        return (Row(f"{self.name} row {number}", row) for number, row in enumerate(self.table, 1))


Source = RowFile | HubSplit


def load_own_examples(cfg: DataConfig, split: str) -> OwnExamples:
    """Return the examples of `train` or `validation`.

    Validation is what the settings name, or the split of that name of a data set or a folder, or what is held out of
    the rows to train on.

    Raises:
        UserError: The data is not there, its columns are in doubt, or rows have mistakes, which are told together.
    """
    own = FORMATS[cfg.format].rows
    assert own is not None
    train, validation, notes = _sources(cfg, own)
    examples, columns = _read(validation if validation and split == "validation" else train, cfg, own)
    if validation:
        held_out = f"validation: {', '.join(source.name for source in validation)}"
    else:
        held, held_out = _held_out(len(examples), cfg, own)
        examples = [example for number, example in enumerate(examples) if (number in held) == (split == "validation")]
    # Where the settings name everything there is nothing to tell.
    return OwnExamples(examples, [columns, *notes, held_out] if own.fields is None else ())


def _sources(cfg: DataConfig, own: OwnRows) -> tuple[list[Source], list[Source], list[str]]:
    """What to train on, what to validate on (nothing if that is to be held out), and notes."""
    assert cfg.path is not None  # DataConfig's own check
    path = Path(cfg.path)
    validation: list[Source] = [RowFile(cfg.validation_path)] if cfg.validation_path is not None else []
    if own.reads_hub and is_hub_id(cfg.path):
        return _hub_sources(cfg, validation)
    if cfg.subset is not None or cfg.validation_split is not None:
        raise UserError(f"data.subset and data.validation_split are for the hub; data.path {path} is on this machine")
    if own.reads_hub and path.is_dir():
        return _folder_sources(path, validation)
    if own.reads_hub and path.is_file() and suffix_of(path) is None:
        raise UserError(f"data.path {path}: how to read it cannot be told; expected {', '.join(READERS)} at its end")
    return [RowFile(cfg.path)], validation, []


def _hub_sources(cfg: DataConfig, validation: list[Source]) -> tuple[list[Source], list[Source], list[str]]:
    name = str(cfg.path)
    try:
        parts = load_data_set(name, cfg.subset)
    except UserError as error:
        near = did_you_mean_path(name)
        raise UserError(f"data.path {name}: no such file here{near}. As a data set, {error}") from error
    for key, split in (("train_split", cfg.train_split), ("validation_split", cfg.validation_split)):
        if split is not None and split not in parts:
            raise UserError(
                f"data.{key} is {split!r}, and {name} has the splits {', '.join(parts)}{did_you_mean(split, parts)}"
            )
    second = cfg.validation_split or ("validation" if "validation" in parts else None)
    if second is not None and second != cfg.train_split and not validation:
        validation = [HubSplit(f"{name}:{second}", parts[second])]
    return [HubSplit(f"{name}:{cfg.train_split}", parts[cfg.train_split])], validation, []


def _folder_sources(folder: Path, validation: list[Source]) -> tuple[list[Source], list[Source], list[str]]:
    """The files of a folder, by splits where their names tell them."""
    files = [path for path in sorted(folder.iterdir()) if suffix_of(path) and not path.name.startswith(".")]
    by_split: dict[str | None, list[Path]] = {}
    for path in files:
        stem = path.name.lower().partition(".")[0]
        split = next((name for name, form in SPLIT_FILES.items() if re.match(rf"({form})(?![a-z])", stem)), None)
        by_split.setdefault(split, []).append(path)
    train = by_split.get("train") or by_split.get(None, [])
    if not train:
        raise UserError(f"data.path {folder}: no file to train on in there; expected files with {', '.join(READERS)}")
    found: list[Source] = [RowFile(str(path)) for path in by_split.get("validation", [])]
    read = {*train, *by_split.get("validation", [])} if not validation else {*train}
    left = [path.name for path in files if path not in read]
    notes = [f"not read in {folder}: {', '.join(left)}"] if left else []
    return [RowFile(str(path)) for path in train], validation or found, notes


def _read(sources: Sequence[Source], cfg: DataConfig, own: OwnRows) -> tuple[list[Example], str]:
    """The examples of all rows, and a note on the columns that they are made of."""
    first = sources[0]
    present = _columns_of(first)
    columns = find_columns(cfg, present, own.fields, first.name)
    examples = [one for source in sources for one in made_of(source.rows(), source.name, columns.example)]
    left = [name for name in present if name not in columns.taken]
    unused = f"; not used: {', '.join(left)}" if left else ""
    return examples, f"{', '.join(source.name for source in sources)}: {len(examples):,} rows; {columns.text}{unused}"


def _columns_of(source: Source) -> list[str]:
    peeked = islice((found for found in source.rows() if isinstance(found, Row)), PEEKED_ROWS)
    present = list(dict.fromkeys(name for row in peeked for name in row.values))
    if not present:
        list(made_of(source.rows(), source.name, lambda row: row))  # tells what is wrong with them
        raise UserError(f"{source.name}: holds no records")
    return present


def own_columns(cfg: DataConfig) -> Columns:
    """Return which columns a format of own rows takes from its training data.

    Raises:
        UserError: As `load_own_examples`.
    """
    own = FORMATS[cfg.format].rows
    assert own is not None
    first = _sources(cfg, own)[0][0]
    return find_columns(cfg, _columns_of(first), own.fields, first.name)


def _held_out(size: int, cfg: DataConfig, own: OwnRows) -> tuple[set[int], str]:
    """Which rows are held out, and a note on them."""
    fraction = cfg.validation_fraction
    if fraction is not None or not own.guards_best:
        count = min(round((fraction or 0) * size), size - 1)
    elif size < FEWEST_TO_HOLD_OUT:
        return set(), f"held out for validation: none, of fewer than {FEWEST_TO_HOLD_OUT} rows"
    else:
        count = min(round(HELD_OUT_SHARE * size), MOST_HELD_OUT)
    if not own.guards_best:
        return set(range(size - count, size)), f"held out for validation: the last {count:,} rows"
    # Files are often sorted, so that their ends are unlike the rest.
    held = permutation(size, cfg.split_seed)[:count].tolist()
    return set(held), f"held out for validation: {count:,} rows, drawn at random (data.split_seed {cfg.split_seed})"

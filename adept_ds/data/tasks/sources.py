"""A data set's rows: from local files, from the hub, or from what the hub gave before (the cache of `datasets`).

Rows stay in Arrow tables, memory-mapped where they are from the hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow

from adept_ds.data.load_hub import load_data_set
from adept_ds.data.tasks.registry import HUB_IDS
from adept_ds.data.tasks.task import Task
from adept_ds.errors import UserError, did_you_mean
from adept_ds.formats.row_files import READERS, iterate_rows, suffix_of
from adept_ds.formats.rows import Row, check_columns

if TYPE_CHECKING:
    import datasets

CHUNK = 1_000
LONGEST_INTEGER = 64
"""Bits, the sign included, that a table's column holds."""


@dataclass(frozen=True)
class RawSplit:
    """The columns that a task reads of one split of its data set."""

    table: datasets.Dataset
    where: str
    """File, or hub id and split, for messages."""

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, indices: np.ndarray) -> Iterator[Row]:
        """Yield the rows at `indices`, in their order."""
        for start in range(0, len(indices), CHUNK):
            chunk = indices[start : start + CHUNK]
            columns = self.table[chunk]
            for index, values in zip(chunk, zip(*columns.values(), strict=True), strict=True):
                yield Row(f"{self.where} row {index + 1}", dict(zip(columns, values, strict=True)))


def read_split(task: Task, split: str, folder: str | None, hub_ids: Mapping[str, str]) -> RawSplit:
    """Read the columns of `task` from one split of its data set.

    Args:
        task: What is read; a task of the user's own may name its files itself.
        split: The data set's own name of the split.
        folder: Folder of local data: FOLDER/TASK/SPLIT.jsonl (.jsonl.gz, .csv, .parquet). None takes the hub.
        hub_ids: Hub ids in place of those of the registry.

    Raises:
        UserError: The data is not there (says what to fetch, and where to put it), is malformed, or lacks a column.
    """
    if task.files:
        return _read_file(Path(task.files[split]), task)  # type: ignore[index]  # the names of such a task's splits
    if folder is not None:
        return _read_file(_local_file(task, split, Path(folder)), task)
    return _read_hub(task, split, hub_ids)


def _local_file(task: Task, split: str, folder: Path) -> Path:
    wanted = [f"{split}{suffix}" for suffix in READERS]
    candidates = [folder / task.name / f"{name}{end}" for name in wanted for end in ("", ".gz")]
    found = [path for path in candidates if path.is_file() and suffix_of(path)]
    if len(found) == 1:
        return found[0]
    problem = f"{' and '.join(map(str, found))} are both there" if found else "no such file is there"
    raise UserError(
        f"task {task.name}: {problem}; expected one of {', '.join(str(folder / task.name / name) for name in wanted)} "
        f"with the columns {', '.join(task.columns())}, or data.path: null to take {_hub_text(task, {})}"
    )


def _read_file(path: Path, task: Task) -> RawSplit:
    if suffix_of(path) is None:
        raise UserError(f"task {task.name}: {path} must end with one of {', '.join(READERS)}")
    import datasets

    columns = task.columns()
    chunks = []
    rows = iterate_rows(path, lambda row: [_cell(row, column) for column in columns])
    try:
        while chunk := list(islice(rows, CHUNK)):
            chunks.append(pyarrow.table(dict(zip(columns, map(_of_one_type, zip(*chunk, strict=True)), strict=True))))
        table = pyarrow.concat_tables(chunks, promote_options="permissive") if chunks else pyarrow.table({})
    except pyarrow.ArrowException as error:
        raise UserError(f"task {task.name}: {path} cannot be read ({error})") from error
    if not len(table):
        raise UserError(f"task {task.name}: {path} holds no records")
    return RawSplit(datasets.Dataset(table), str(path))


def _of_one_type(cells: Sequence[Any]) -> list[Any]:
    """A column's cells; numbers among texts as the texts that they are read as anyway."""
    if not any(isinstance(cell, str) for cell in cells):
        return list(cells)
    is_number = [isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells]
    return [str(cell) if number else cell for cell, number in zip(cells, is_number, strict=True)]


def _cell(row: Row, column: str) -> object:
    value = row.get(column, object)
    if isinstance(value, int) and value.bit_length() >= LONGEST_INTEGER:
        raise UserError(f"{row.where}: {column} is an integer of {len(str(value))} digits; expected at most 64 bits")
    return value


def _read_hub(task: Task, split: str, hub_ids: Mapping[str, str]) -> RawSplit:
    name = hub_id(task, hub_ids)
    try:
        parts = load_data_set(name, task.subset)
    except UserError as error:
        splits = ", ".join(dict.fromkeys(task.split_name(part) for part in ("train", "validation", "test")))
        raise UserError(
            f"task {task.name}: {error}, or put its splits ({splits}) into files FOLDER/{task.name}/SPLIT.jsonl (.csv, "
            f".parquet) with the columns {', '.join(task.columns())} and set data.path to FOLDER; data.hub_ids names "
            "another copy on the hub"
        ) from error
    if split not in parts:
        raise UserError(
            f"task {task.name}: {name} has no split {split!r}; it has {', '.join(parts)}" + did_you_mean(split, parts)
        )
    where = f"{name}:{split}"
    check_columns(task.columns(), parts[split].column_names, where)
    return RawSplit(parts[split].select_columns(task.columns()), where)


def hub_id(task: Task, hub_ids: Mapping[str, str]) -> str:
    """Return the hub id that `task` is loaded from."""
    assert task.dataset is not None
    return {**HUB_IDS, **hub_ids}.get(task.dataset, task.dataset)


def _hub_text(task: Task, hub_ids: Mapping[str, str]) -> str:
    return f"{hub_id(task, hub_ids)}{f' ({task.subset})' if task.subset else ''}" if task.dataset else "no hub data set"

"""A data set's rows: from local files, from the hub, or from what the hub gave before (the cache of `datasets`).

Rows stay in Arrow tables, memory-mapped where they are from the hub. Scripts of data sets are never run; where a hub
repository still has one, the Parquet files that the hub makes of every data set are taken.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet

from adept_ds.data.tasks.registry import HUB_IDS
from adept_ds.data.tasks.task import Task
from adept_ds.errors import UserError, did_you_mean
from adept_ds.formats.rows import Row, iterate_rows

if TYPE_CHECKING:
    import datasets

CHUNK = 1_000
PARQUET_BRANCH = "refs/convert/parquet"
"""Branch on which the hub keeps every data set as Parquet files, in a folder a configuration."""


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
    candidates = [folder / task.name / f"{split}{suffix}" for suffix in READERS]
    found = [path for path in candidates if path.is_file()]
    if len(found) == 1:
        return found[0]
    problem = f"{' and '.join(map(str, found))} are both there" if found else "no such file is there"
    raise UserError(
        f"task {task.name}: {problem}; expected one of {', '.join(map(str, candidates))} with the columns "
        f"{', '.join(task.columns())}, or data.path: null to take {_hub_text(task, {})}"
    )


def _read_file(path: Path, task: Task) -> RawSplit:
    suffix = next((suffix for suffix in READERS if path.name.endswith(suffix)), None)
    if suffix is None:
        raise UserError(f"task {task.name}: {path} must end with one of {', '.join(READERS)}")
    try:
        import datasets

        table = READERS[suffix](path, task.columns())
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"task {task.name}: {path} cannot be read ({error})") from error
    if not len(table):
        raise UserError(f"task {task.name}: {path} holds no records")
    return RawSplit(datasets.Dataset(table), str(path))


def _read_jsonl(path: Path, columns: Sequence[str]) -> pyarrow.Table:
    chunks = []
    rows = iterate_rows(path)
    while chunk := list(islice(rows, CHUNK)):
        chunks.append(pyarrow.table({column: [row.get(column, object) for row in chunk] for column in columns}))
    return pyarrow.concat_tables(chunks, promote_options="permissive") if chunks else pyarrow.table({})


def _read_csv(path: Path, columns: Sequence[str]) -> pyarrow.Table:
    """Every cell is text: "null", "NA" and "007" are what they are."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file), [])
    _check_columns(columns, header, str(path))
    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={column: pyarrow.string() for column in columns},
            include_columns=list(columns),
            strings_can_be_null=False,
        ),
    )


def _read_parquet(path: Path, columns: Sequence[str]) -> pyarrow.Table:
    _check_columns(columns, pyarrow.parquet.read_schema(path).names, str(path))
    return pyarrow.parquet.read_table(path, columns=list(columns))


READERS: dict[str, Callable[[Path, Sequence[str]], pyarrow.Table]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""By the end of a file's name."""


def _read_hub(task: Task, split: str, hub_ids: Mapping[str, str]) -> RawSplit:
    name = hub_id(task, hub_ids)
    parts = _load_hub(task, name, hub_ids)
    if split not in parts:
        raise UserError(
            f"task {task.name}: {name} has no split {split!r}; it has {', '.join(parts)}" + did_you_mean(split, parts)
        )
    where = f"{name}:{split}"
    _check_columns(task.columns(), parts[split].column_names, where)
    return RawSplit(parts[split].select_columns(task.columns()), where)


def _load_hub(task: Task, name: str, hub_ids: Mapping[str, str]) -> Mapping[str, datasets.Dataset]:
    """Load from the hub or the cache: the repository as it stands, else the hub's own Parquet files of it."""
    import datasets

    attempts: list[dict[str, Any]] = [
        {"name": task.subset},
        {"data_dir": task.subset or "default", "revision": PARQUET_BRANCH},
    ]
    errors = []
    for attempt in attempts:
        try:
            return datasets.load_dataset(name, **attempt)
        except ConnectionError as error:
            # The cache has been looked at too, and has nothing of this name.
            errors.append(str(error).splitlines()[0])
            break
        except (OSError, ValueError, RuntimeError) as error:
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    splits = ", ".join(dict.fromkeys(task.split_name(part) for part in ("train", "validation", "test")))
    raise UserError(
        f"task {task.name}: {_hub_text(task, hub_ids)} is neither on this machine nor to be had from the hub "
        f"({errors[0]}).\nEither load it once where the hub is reachable and take that machine's cache along "
        f"({datasets.config.HF_DATASETS_CACHE}), or put its splits ({splits}) into files "
        f"FOLDER/{task.name}/SPLIT.jsonl (.csv, .parquet) with the columns {', '.join(task.columns())} and set "
        "data.path to FOLDER; data.hub_ids names another copy on the hub"
    )


def hub_id(task: Task, hub_ids: Mapping[str, str]) -> str:
    """Return the hub id that `task` is loaded from."""
    assert task.dataset is not None
    return {**HUB_IDS, **hub_ids}.get(task.dataset, task.dataset)


def _hub_text(task: Task, hub_ids: Mapping[str, str]) -> str:
    return f"{hub_id(task, hub_ids)}{f' ({task.subset})' if task.subset else ''}" if task.dataset else "no hub data set"


def _check_columns(columns: Sequence[str], present: Sequence[str], where: str) -> None:
    for column in columns:
        if column not in present:
            raise UserError(
                f"{where}: no column {column!r}; it has {', '.join(present)}" + did_you_mean(column, present)
            )

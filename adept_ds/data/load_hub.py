"""Loading a data set of the hub: its repository as it stands, or what the cache of `datasets` has of it.

Scripts of data sets are never run; where a repository still has one, the Parquet files that the hub makes of every data
set are taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_ds.errors import UserError
from adept_ds.formats.row_files import suffix_of

if TYPE_CHECKING:
    import datasets

PARQUET_BRANCH = "refs/convert/parquet"
"""Branch on which the hub keeps every data set as Parquet files, in a folder a configuration."""


def is_hub_id(path: str) -> bool:
    """Whether `data.path` has the form of a data set's id, and is neither there as a file nor called like one."""
    is_file = Path(path).exists() or suffix_of(Path(path)) is not None or path.endswith(".gz")
    return not is_file and re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None


def load_data_set(name: str, subset: str | None) -> Mapping[str, datasets.Dataset]:
    """Return the splits of a data set: from the hub, or from the cache of `datasets` where the hub cannot be reached.

    Raises:
        UserError: It is in neither; says how to get it here.
    """
    import datasets

    attempts: list[dict[str, Any]] = [
        {"name": subset},
        {"data_dir": subset or "default", "revision": PARQUET_BRANCH},
    ]
    errors = []
    for attempt in attempts:
        try:
            return datasets.load_dataset(name, **attempt)
        except ConnectionError as error:
            # The cache has been looked at too, and has nothing of this name.
            errors.append(_first_words(error))
            break
        except (OSError, ValueError, RuntimeError) as error:
            errors.append(f"{type(error).__name__}: {_first_words(error)}")
    raise UserError(
        f"{name}{f' ({subset})' if subset else ''} is neither on this machine nor to be had from the hub "
        f"({errors[0]}).\nEither load it once where the hub is reachable and take that machine's cache along "
        f"({datasets.config.HF_DATASETS_CACHE})"
    )


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

"""Where models and data sets are: in a local folder, or on the hub and then perhaps in this machine's cache.

Nothing here imports torch or `transformers`.
"""

from __future__ import annotations

import json
from pathlib import Path

from adept_ds.config import DataConfig

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"


def is_local(source: str) -> bool:
    """Whether a model's or data set's name is that of a folder, be it there or not, and no hub id."""
    path = Path(source)
    return path.is_dir() or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1


def missing_model_files(source: str, revision: str | None = None) -> list[str]:
    """Files of a safetensors checkpoint that are not on this machine: in the folder, or in the hub's cache."""
    if _find(source, revision, CONFIG_NAME) is None:
        return [CONFIG_NAME]
    if _find(source, revision, WEIGHTS_NAME):
        return []
    index = _find(source, revision, INDEX_NAME)
    if index is None:
        return [WEIGHTS_NAME]
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [name for name in shards if _find(source, revision, name) is None]


def is_tokenizer_here(source: str) -> bool:
    """Whether a tokenizer is on this machine: its folder, or in the hub's cache a file that comes with every one."""
    return Path(source).is_dir() if is_local(source) else _find(source, None, TOKENIZER_CONFIG_NAME) is not None


def is_dataset_cached(name: str) -> bool:
    """Whether `datasets` has a data set of the hub in its cache, from where it is read without the hub."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, own = name.split("/")
    folder = Path(config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, camelcase_to_snakecase(own)])
    return any(folder.glob("*/*/*"))


def hub_data_sets(data: DataConfig) -> list[str]:
    """Ids of the data sets that a run reads from the hub."""
    if data.format == "tasks" and data.path is None:
        from adept_ds.data.tasks import find_task
        from adept_ds.data.tasks.sources import hub_id

        tasks = [find_task(name) for name in data.tasks]
        names = [hub_id(task, data.hub_ids) for task in tasks if task.dataset]
        return list(dict.fromkeys(name for name in names if not is_local(name)))
    if data.path is not None and not Path(data.path).exists() and is_hub_data(data, data.path):
        return [data.path]
    return []


def is_hub_data(data: DataConfig, path: str) -> bool:
    """Whether a data path that is not there as a file is a data set's id."""
    from adept_ds.data.problems import is_hub_id

    return data.format.startswith("mbpp") and is_hub_id(path)


def _find(source: str, revision: str | None, name: str) -> Path | None:
    if is_local(source):
        path = Path(source) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, name, revision=revision)
    return Path(found) if isinstance(found, str) else None

"""Which data sets a run reads from the hub, and whether they are in this machine's cache.

Nothing here imports torch or `transformers`.
"""

from __future__ import annotations

from pathlib import Path

from adept_ds.backbone.hub import is_local
from adept_ds.config.run import DataConfig
from adept_ds.formats import FORMATS


def is_dataset_cached(name: str) -> bool:
    """Whether `datasets` has a data set of the hub in its cache, from where it is read without the hub."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, own = name.split("/")
    folder = Path(config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, camelcase_to_snakecase(own)])
    return any(folder.glob("*/*/*"))


def hub_data_sets(data: DataConfig) -> list[str]:
    """Ids of the data sets that a run reads from the hub."""
    if FORMATS[data.format].has_tasks and data.path is None:
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

    problem_set = FORMATS[data.format].problems
    return problem_set is not None and problem_set.hub_config is not None and is_hub_id(path)

"""Which data sets a run reads from the hub, and whether they are in this machine's cache."""

from __future__ import annotations

import logging

from adept_ds.backbone.hub import is_local
from adept_ds.config.run import DataConfig
from adept_ds.contexts import attribute_set
from adept_ds.data.load_hub import is_hub_id
from adept_ds.formats import FORMATS


def is_dataset_cached(name: str) -> bool:
    """Whether `datasets` has a data set of the hub in its cache, from where it is read without the hub."""
    from datasets.load import CachedDatasetModuleFactory

    # It warns that the hub could not be reached, which nobody has tried.
    with attribute_set(logging.getLogger("datasets.load"), "disabled", True):
        try:
            CachedDatasetModuleFactory(name).get_module()
        except FileNotFoundError:
            return False
    return True


def hub_data_sets(data: DataConfig) -> list[str]:
    """Ids of the data sets that a run reads from the hub."""
    if FORMATS[data.format].has_tasks and data.path is None:
        from adept_ds.data.tasks import find_task
        from adept_ds.data.tasks.sources import hub_id

        tasks = [find_task(name) for name in data.tasks]
        names = [hub_id(task, data.hub_ids) for task in tasks if task.dataset]
        return list(dict.fromkeys(name for name in names if not is_local(name)))
    if data.path is not None and is_hub_data(data, data.path):
        return [data.path]
    return []


def is_hub_data(data: DataConfig, path: str) -> bool:
    """Whether a data path that is not there as a file is a data set's id."""
    return FORMATS[data.format].reads_hub and is_hub_id(path)

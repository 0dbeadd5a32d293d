"""Fetching on the login node what a run reads from the hub, for nodes that cannot reach it.

The loaders of the run itself do the fetching, so that a job finds in the cache just what it asks for. Scripts of models
and data sets are never run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from transformers import GenerationConfig

from adept_ds.backbone.hub import cached_adapter, hub_adapter, is_local, missing_model_files
from adept_ds.backbone.load import load_architecture, load_tokenizer, weight_files
from adept_ds.config.run import DataConfig, ModelConfig, RunConfig
from adept_ds.data.hub import hub_data_sets, is_dataset_cached
from adept_ds.data.problems import load_examples
from adept_ds.formats import FORMATS
from adept_ds.storage.adapter_folder import load_adapter


def prefetch(run: RunConfig) -> Iterator[str]:
    """Fetch model, tokenizer, data and adapters, and say of each, once it is here, whether it was so before.

    Raises:
        UserError: Something is neither here nor to be had from the hub.
    """
    yield from _fetch_model(run.model)
    yield from _fetch_data(run.data)
    for source in run.method.adapter_folders.values():
        if hub_adapter(source):
            was_here = cached_adapter(source) is not None
            load_adapter(source)
            yield f"{source}: adapter, {_how(False, was_here)}"


def _fetch_model(model: ModelConfig) -> Iterator[str]:
    name = model.name_or_path
    was_here = not missing_model_files(name, model.revision)
    load_architecture(model)
    with suppress(OSError):  # not every checkpoint has one
        GenerationConfig.from_pretrained(name, revision=model.revision or "main")
    size = sum(path.stat().st_size for path in weight_files(model))
    yield f"{name}: model, {size / 1e9:.2f} GB of weights, {_how(is_local(name), was_here)}"
    load_tokenizer(model)
    yield f"{model.tokenizer or name}: tokenizer, here"


def _fetch_data(data: DataConfig) -> Iterator[str]:
    names = hub_data_sets(data)
    was_here = {name: is_dataset_cached(name) for name in names}
    for split in FORMATS[data.format].splits:
        load_examples(data, split)
    for name in names:
        yield f"{name}: data set, {_how(False, was_here[name])}"
    if not names:
        yield f"{data.path or 'bundled problems'}: data, {_how(True, True)}"


def _how(is_local_file: bool, was_here: bool) -> str:
    return "a local file" if is_local_file else "in the cache already" if was_here else "fetched"

"""Where models are: in a local folder, or on the hub and then perhaps in this machine's cache.

Nothing here imports torch or `transformers`.
"""

from __future__ import annotations

from pathlib import Path

from adept_ds.backbone.weight_files import read_index

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
    return [name for name in read_index(index) if _find(source, revision, name) is None]


def is_tokenizer_here(source: str) -> bool:
    """Whether a tokenizer is on this machine: its folder, or in the hub's cache a file that comes with every one."""
    return Path(source).is_dir() if is_local(source) else _find(source, None, TOKENIZER_CONFIG_NAME) is not None


def cached_commit(source: str, revision: str | None = None) -> str | None:
    """Commit of the hub's repository that a model in this machine's cache is of; None for a local folder."""
    found = None if is_local(source) else _find(source, revision, CONFIG_NAME)
    # The cache has a folder for each commit.
    return found.parent.name if found else None


def _find(source: str, revision: str | None, name: str) -> Path | None:
    if is_local(source):
        path = Path(source) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, name, revision=revision)
    return Path(found) if isinstance(found, str) else None

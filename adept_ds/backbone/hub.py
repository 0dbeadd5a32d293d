"""Where models and adapters are: in a local folder, or on the hub and then perhaps in this machine's cache.

Nothing here imports torch or `transformers`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adept_ds.backbone.weight_files import read_index
from adept_ds.errors import UserError, did_you_mean_path

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
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


def hub_adapter(source: str | Path) -> tuple[str, str | None] | None:
    """Return the hub id and the revision that an adapter's name stands for, as in `owner/name` and `owner/name@v1`;
    None where it is that of a folder, be it there or not."""
    name, _, revision = str(source).partition("@")
    # A folder may be misspelt: an owner that is a folder here is none of the hub's.
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).parent.is_dir()
    return (name, revision or None) if is_id and not Path(source).is_dir() else None


def cached_adapter(source: str | Path) -> Path | None:
    """Return the folder of an adapter: of one of the hub that in this machine's cache; None if it is not there."""
    named = hub_adapter(source)
    if named is None:
        return Path(source)
    found = _find(*named, ADAPTER_CONFIG_NAME)
    return found.parent if found else None


def fetch_files(source: str, revision: str | None, names: Sequence[str]) -> Path:
    """Return the folder of the hub's cache with those files of a repository that it has, fetched if need be.

    What is in the cache serves where the hub cannot be reached.

    Raises:
        UserError: It is neither there nor here.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(names)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"{source}: no such folder{did_you_mean_path(source)}, and as a repository of the hub{at} not to be had: "
            f"{reason}"
        ) from error


def _find(source: str, revision: str | None, name: str) -> Path | None:
    if is_local(source):
        path = Path(source) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def push_folder(folder: Path, repository: str, private: bool | None = None, **options: Any) -> str:
    """Upload a folder to a repository of the hub, which is made if it is not there; return the commit's address.

    Args:
        folder: What is uploaded, all of it.
        repository: Its id on the hub.
        private: Whether a new repository is for its owner alone; as the owner has set it if None.
        **options: Handed to `HfApi.upload_folder`, such as `revision` and `commit_message`.

    Raises:
        UserError: The hub refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="adept_ds")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, **options).commit_url)
    except Exception as error:
        # What is raised where there is no network is of the HTTP library that `huggingface_hub` happens to use.
        reason = " ".join(str(error).split())
        raise UserError(
            f"{repository}: the hub refuses the upload, or cannot be reached: {reason} (`hf auth login` keeps a token "
            "on this machine, HF_TOKEN holds one for a command)"
        ) from error

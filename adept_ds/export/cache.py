"""Whole models that adapters were folded into, kept for programs that decode with them again and again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from adept_ds.backbone.load import weight_files
from adept_ds.backbone.weight_files import fingerprint
from adept_ds.config.run import ModelConfig
from adept_ds.export.export import NONE, Request, export_folded
from adept_ds.export.manifest import FORMAT, MANIFEST_NAME, read_manifest
from adept_ds.storage.adapter_folder import Adapter


@dataclass(frozen=True)
class WholeModel:
    """A folder that other programs load, and what a prompt begins with there."""

    folder: Path
    prompt_ids: tuple[int, ...] = ()
    """Token ids of the soft prompt, for who puts them in front of every text."""


def whole_model(config: ModelConfig, adapter: Adapter | None, task: str | None, cache: Path) -> WholeModel:
    """Return the model as a folder: the backbone's own without an adapter, else one that is made unless it is there.

    Its name has a hash of the adapter, the backbone's weights and the precision. Its tokenizer puts no prompt in front.

    Raises:
        UserError: As `export_folded`.
    """
    paths = weight_files(config)
    if adapter is None:
        return WholeModel(paths[0].parent)
    parts = [FORMAT, adapter.facts["tensors_sha256"], fingerprint(paths), config.dtype, task]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    folder = cache / f"{Path(config.name_or_path).name}-{adapter.method.name}-{digest}"
    if not (folder / MANIFEST_NAME).is_file():
        print(f"{adapter.folder}: folded into {folder}, to be kept there")
        export_folded(Request(adapter, config, folder, task, prompt_in=NONE, verify=False))
    return WholeModel(folder, tuple(read_manifest(folder).prompt_token_ids))

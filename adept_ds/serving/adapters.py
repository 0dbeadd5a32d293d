"""What is to be served: a serving base and the adapters on it, checked before anything is started."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_ds.backbone.hub import ADAPTER_CONFIG_NAME, CONFIG_NAME
from adept_ds.backbone.weight_files import read_header
from adept_ds.errors import UserError, did_you_mean_path
from adept_ds.export.forms import LORA
from adept_ds.export.manifest import MANIFEST_NAME, SERVING_BASE, Manifest, read_manifest
from adept_ds.files import read_json

TENSORS_NAME = "adapter_model.safetensors"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM takes for `--max-lora-rank`."""
CACHE_NAME = ".adept-ds-serving"
"""Folder beside an adapter for its LoRA form."""


@dataclass(frozen=True)
class ServingBase:
    """What `adept-ds export --serving-base` wrote."""

    folder: Path
    manifest: Manifest
    rows: int
    """Of its table."""


@dataclass(frozen=True)
class ServedAdapter:
    """A LoRA folder that fits the serving base."""

    name: str
    folder: Path
    length: int
    """Tokens of its soft prompt."""
    rank: int
    target_modules: Sequence[str]
    digest: str | None
    """sha256 of its tensors, by its manifest."""


def read_base(folder: Path) -> ServingBase:
    """Read a serving base.

    Raises:
        UserError: It is none, or one that vLLM does not run.
    """
    if not folder.is_dir():
        raise UserError(f"--base {folder}: no such folder{did_you_mean_path(str(folder))}")
    manifest = read_manifest(folder)
    if manifest.form != SERVING_BASE:
        raise UserError(
            f"--base {folder} is an export of the form {manifest.form!r}; expected one that "
            "`adept-ds export --serving-base --rows L --base MODEL --out DIR` wrote"
        )
    config = read_json(folder / CONFIG_NAME)
    if config.get("is_encoder_decoder"):
        raise UserError(f"--base {folder} is an encoder-decoder ({config.get('model_type')}), which vLLM does not run")
    return ServingBase(folder.absolute(), manifest, int(config["vocab_size"]))


def named_folders(adapters: Sequence[str], folder: Path | None) -> tuple[dict[str, Path], list[str], list[str]]:
    """Return folders of adapters by name, what is wrong with the names, and the subfolders that are none.

    Args:
        adapters: `NAME=FOLDER` each.
        folder: Each subfolder of it that holds a LoRA of ours is one, by its name.
    """
    found: dict[str, Path] = {}
    problems, skipped = [], []
    for text in adapters:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            problems.append(f"--adapters {text}: expected NAME=FOLDER")
        elif name in found:
            problems.append(f"--adapters {text}: {name!r} is {found[name]} already")
        else:
            found[name] = Path(path)
    if folder is not None and not folder.is_dir():
        problems.append(f"--folder {folder}: no such folder{did_you_mean_path(str(folder))}")
    elif folder is not None:
        for inner in sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")):
            if not _is_lora(inner):
                skipped.append(inner.name)
            elif inner.name in found:
                problems.append(f"--folder {folder}: {inner.name!r} is {found[inner.name]} already, by --adapters")
            else:
                found[inner.name] = inner
    return found, problems, skipped


def _is_lora(folder: Path) -> bool:
    """Whether the folder says so; what is wrong with it is told by `check_adapter`."""
    path = folder / MANIFEST_NAME
    return path.is_file() and read_json(path).get("form") == LORA


def is_trained(folder: Path) -> bool:
    """Whether a folder is an adapter as training leaves it."""
    return not (folder / MANIFEST_NAME).exists() and (folder / ADAPTER_CONFIG_NAME).is_file()


def check_adapter(name: str, folder: Path, base: ServingBase) -> ServedAdapter:
    """Return a LoRA folder as it is to be served.

    Raises:
        UserError: It is none, or one of another serving base, or has more than vLLM takes.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder{did_you_mean_path(str(folder))}")
    manifest = read_manifest(folder)
    if manifest.form != LORA:
        raise UserError(f"an export of the form {manifest.form!r}; expected `adept-ds export --to lora`")
    _, header = read_header(folder / TENSORS_NAME)
    config = read_json(folder / ADAPTER_CONFIG_NAME)
    rank, targets = config.get("r"), config.get("target_modules")
    if not isinstance(rank, int) or not isinstance(targets, list):
        raise UserError(f"{folder / ADAPTER_CONFIG_NAME} has no rank and modules of a LoRA")
    length = len(manifest.prompt_token_ids)
    rows = {tensor["shape"][1] for name, tensor in header.items() if name.endswith("lora_embedding_A")}
    differences = [
        what
        for what, is_different in {
            "another backbone's token embeddings": _fingerprint(manifest) != _fingerprint(base.manifest),
            "other prompt tokens": list(manifest.prompt_token_ids) != list(base.manifest.prompt_token_ids)[:length],
            f"{rows} rows, the base has {base.rows}": rows != {base.rows},
        }.items()
        if is_different
    ]
    if differences:
        raise UserError(
            f"exported for the serving base {manifest.serving_base}, not for {base.folder}: {', '.join(differences)}; "
            "export it again with --serving-base"
        )
    if rank > RANKS[-1]:
        raise UserError(f"rank {rank} (prompt, bottleneck and 1); vLLM takes up to {RANKS[-1]}")
    digest = manifest.files.get(TENSORS_NAME)
    return ServedAdapter(name, folder.absolute(), length, rank, targets, digest)


def _fingerprint(manifest: Manifest) -> Any:
    return manifest.base.get("embedding_fingerprint")


def exported(folder: Path, base: ServingBase, cache: Path | None) -> Path:
    """Return the LoRA folder of an adapter as it was trained, which is written unless it is in the cache.

    Its name has a hash of the adapter and of the serving base, so what has changed is exported anew.

    Args:
        folder: The adapter.
        base: What its LoRA goes onto.
        cache: Where LoRA folders are kept; beside the adapter if None.

    Raises:
        UserError: The adapter cannot be exported so, belongs to another backbone, or does not compute the same.
    """
    facts: Mapping[str, Any] = read_json(folder / ADAPTER_CONFIG_NAME)
    prompt = list(base.manifest.prompt_token_ids)
    parts = [facts.get("tensors_sha256"), base.manifest.base, base.manifest.dtype, base.rows, prompt, str(base.folder)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    cache = folder.absolute().parent / CACHE_NAME if cache is None else cache
    out = cache / f"{folder.absolute().name}-{digest}"
    if not out.is_dir():
        # The libraries behind these take seconds to load.
        from adept_ds.export.export import Request, backbone_of, export_lora
        from adept_ds.storage.adapter_folder import load_adapter

        adapter = load_adapter(folder)
        agreement = export_lora(Request(adapter, backbone_of(adapter), out), base.folder)
        print(f"{folder}: exported to {out}; {agreement}")
    return out

"""Adapters of HF PEFT, and those that the authors of DePT and ADePT published, in the form of this project.

    adept-ds import IN OUT [--backbone NAME_OR_PATH]

IN is a folder with `adapter_config.json` and the tensors, as PEFT writes them (prompt tuning, P-tuning, prefix tuning,
LoRA, IA3; see `adept_ds.export.peft_folder`) or the authors' fork of it; OUT is an adapter folder. Tensors are read
without running code that a pickle may hold (`weights_only`). The fork's are

    prompt_embeddings                  P [l, d]
    prompt_encoder.lora_embedding_A    DePT: A [S, r]    ADePT: W_down [d, r]
    prompt_encoder.lora_embedding_B    DePT: B [r, d]    ADePT: W_up [r, d]
    prompt_encoder.lora_embedding_a    ADePT: b1 [r]
    prompt_encoder.lora_embedding_b    ADePT: b2 [d]
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from adept_ds.backbone.load import empty_backbone, resolve_architecture
from adept_ds.config.command_line import parse_flags
from adept_ds.config.method import AdeptConfig, DeptConfig, MethodConfig
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError
from adept_ds.export.peft_folder import is_peft_folder, read_peft_folder
from adept_ds.files import read_json
from adept_ds.storage import adapter_folder

PUBLISHED_CONFIG, PUBLISHED_TENSORS = "adapter_config.json", "adapter_model.bin"
_PROMPT = "prompt_embeddings"
_DEPT = {
    _PROMPT: "soft_prompt",
    "prompt_encoder.lora_embedding_A": "offset.a",
    "prompt_encoder.lora_embedding_B": "offset.b",
}
_ADEPT = {
    _PROMPT: "soft_prompt",
    "prompt_encoder.lora_embedding_A": "network.w_down",
    "prompt_encoder.lora_embedding_B": "network.w_up",
    "prompt_encoder.lora_embedding_a": "network.b1",
    "prompt_encoder.lora_embedding_b": "network.b2",
}


def import_adapter(source: str | Path, folder: str | Path, backbone: str | None = None) -> MethodConfig:
    """Write the adapter in `source` to `folder`; return the method's settings.

    Args:
        source: Folder of an adapter of PEFT's, or of a published one.
        folder: The adapter folder to write.
        backbone: Hub id or folder of the backbone that it was trained on; what its config names if not given.

    Raises:
        UserError: A file or a tensor is missing, is damaged, or does not fit the others; or the backbone's config
            cannot be had.
    """
    source = Path(source)
    if is_peft_folder(source):
        return _import_peft(source, folder, backbone)
    for name in (PUBLISHED_CONFIG, PUBLISHED_TENSORS):
        if not (source / name).is_file():
            raise UserError(f"{source} is not a published adapter: it has no {name}")
    published, tensors = _read_config(source / PUBLISHED_CONFIG), _read_tensors(source / PUBLISHED_TENSORS)
    names = _ADEPT if tensors.keys() & (_ADEPT.keys() - _DEPT.keys()) else _DEPT
    missing, unknown = sorted(names.keys() - tensors.keys()), sorted(tensors.keys() - names.keys())
    if missing or unknown:
        problems = [f"{', '.join(missing)} missing"] if missing else []
        problems += [f"{', '.join(unknown)} not known"] if unknown else []
        method = "ADePT" if names is _ADEPT else "DePT"
        raise UserError(f"{source / PUBLISHED_TENSORS} is not a whole {method} adapter: {'; '.join(problems)}")
    values = {ours: tensors[theirs].float() for theirs, ours in names.items()}
    length, width = values["soft_prompt"].shape
    method_config: DeptConfig | AdeptConfig
    shapes: dict[str, tuple[int, ...]]
    if names is _DEPT:
        positions, rank = values["offset.a"].shape
        method_config = DeptConfig(num_virtual_tokens=length, rank=rank, max_positions=positions)
        shapes = {"soft_prompt": (length, width), "offset.a": (positions, rank), "offset.b": (rank, width)}
    else:
        rank = values["network.w_down"].shape[1]
        method_config = AdeptConfig(num_virtual_tokens=length, bottleneck=rank)
        shapes = {"soft_prompt": (length, width), "network.w_down": (width, rank), "network.w_up": (rank, width)}
        shapes |= {"network.b1": (rank,), "network.b2": (width,)}
    adapter_folder.check_tensors(values, shapes)
    name = backbone or published["base_model_name_or_path"]
    architecture = _architecture(name)
    if architecture.hidden_size != width:
        raise UserError(f"{source} has vectors of width {width}; {name!r} has embeddings of {architecture.hidden_size}")
    adapter_folder.save_adapter(
        folder, method_config, values, _facts(name, architecture), {"imported_from": str(source)}
    )
    return method_config


def _import_peft(source: Path, folder: str | Path, backbone: str | None) -> MethodConfig:
    name = backbone or read_json(source / PUBLISHED_CONFIG).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{source} does not say which backbone it belongs to; name it by --backbone")
    config = ModelConfig(name_or_path=name)
    architecture = _architecture(name)
    method, tensors = read_peft_folder(source, empty_backbone(config, architecture))
    adapter_folder.save_adapter(folder, method, tensors, _facts(name, architecture), {"imported_from": str(source)})
    return method


def _architecture(name: str) -> PreTrainedConfig:
    return resolve_architecture(ModelConfig(name_or_path=name))[0]


def _facts(name: str, architecture: PreTrainedConfig) -> dict[str, Any]:
    return {
        "name_or_path": name,
        "revision": None,
        "model_type": architecture.model_type,
        "hidden_size": architecture.hidden_size,
        "vocab_size": architecture.vocab_size,
        "embedding_fingerprint": None,
    }


def _read_config(path: Path) -> dict[str, Any]:
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(published, dict) or "base_model_name_or_path" not in published:
        raise UserError(f"{path} has no base_model_name_or_path")
    return published


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is damaged or holds more than tensors: {reason}") from error


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All arguments."""
    parser.add_argument("source", metavar="IN", type=Path, help="folder of the published adapter")
    parser.add_argument("folder", metavar="OUT", type=Path, help="adapter folder to write")
    parser.add_argument("--backbone", help="hub id or folder of its backbone; what its config names if not given")


def main(arguments: Sequence[str]) -> None:
    """Parse, convert, tell the settings."""
    flags = parse_flags(arguments, "adept-ds import", __doc__ or "", add_flags)
    settings = import_adapter(flags.source, flags.folder, flags.backbone)
    print(f"{flags.folder}: {settings.model_dump(exclude_defaults=True) | {'name': settings.name}}")

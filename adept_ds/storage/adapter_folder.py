"""The adapter folder: `adapter_config.json` and `adapter_model.safetensors`.

The tensors are the fp32 master values under the method's own names. The config holds the method's settings, which
backbone the adapter was trained on (with a fingerprint of its embedding table), and the versions that wrote it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from adept_ds.backbone.hub import ADAPTER_CONFIG_NAME, fetch_files, hub_adapter
from adept_ds.backbone.sharding import gathered
from adept_ds.backbone.table import open_table, stored_dtype
from adept_ds.config.method import CONSTANTS, MethodConfig
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError, did_you_mean
from adept_ds.files import atomic_write, write_json

CONFIG_NAME = ADAPTER_CONFIG_NAME
TENSORS_NAME = "adapter_model.safetensors"
FORMAT = "adept_ds/1"
FINGERPRINT_ROWS = 64
_METHOD_CONFIG: TypeAdapter[MethodConfig] = TypeAdapter(MethodConfig)


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter folder."""

    folder: Path
    method: MethodConfig
    tensors: dict[str, Tensor]
    backbone: dict[str, Any]
    facts: dict[str, Any]

    @property
    def trained_parameters(self) -> int:
        """How many numbers in it were trained."""
        return sum(tensor.numel() for name, tensor in self.tensors.items() if name not in CONSTANTS)


def backbone_facts(backbone: PreTrainedModel) -> dict[str, Any]:
    """What an adapter says about the backbone it belongs to. Collective under ZeRO-3.

    Its revision is known where `load_backbone` has loaded it from the hub.
    """
    table = cast(nn.Embedding, backbone.get_input_embeddings())
    facts = {
        "name_or_path": backbone.config.name_or_path,
        "revision": getattr(backbone, "hub_revision", None),
        "model_type": backbone.config.model_type,
        "hidden_size": table.embedding_dim,
        "vocab_size": table.num_embeddings,
        "embedding_fingerprint": embedding_fingerprint(table),
    }
    if table.weight.dtype == torch.float16 and not table.weight.is_meta:
        # fp16 rounds otherwise than bf16: the checkpoint's own values have the fingerprint that other precisions have.
        facts |= {"fp16_fingerprint": facts["embedding_fingerprint"]}
        facts |= {"embedding_fingerprint": _stored_fingerprint(backbone) or facts["embedding_fingerprint"]}
    return facts


def _stored_fingerprint(backbone: PreTrainedModel) -> str | None:
    """As `embedding_fingerprint`, of the table in the checkpoint's files; None if they are not where it says."""
    name, revision = str(backbone.config.name_or_path), getattr(backbone, "hub_revision", None)
    try:
        config = ModelConfig(name_or_path=name, revision=revision)
        with open_table(config.model_copy(update={"dtype": stored_dtype(config)})) as opened:
            return embedding_fingerprint(cast(nn.Embedding, opened.backbone.get_input_embeddings()))
    except (UserError, ValidationError):
        return None


def embedding_fingerprint(table: nn.Embedding) -> str | None:
    """sha256 over 64 evenly spaced rows of the table, rounded to bf16 so that the precision it is loaded in is no
    matter; None on the meta device."""
    if table.weight.is_meta:
        return None
    rows = torch.linspace(0, table.num_embeddings - 1, FINGERPRINT_ROWS).long().to(table.weight.device)
    with gathered([table.weight]), torch.no_grad():
        sample = F.embedding(rows, table.weight).to("cpu", torch.bfloat16)
    return hashlib.sha256(sample.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def save_adapter(
    folder: str | Path,
    method: MethodConfig,
    tensors: Mapping[str, Tensor],
    backbone: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write an adapter folder. The config comes last: a folder without it is not an adapter.

    Raises:
        UserError: As `check_finite`.
    """
    folder = Path(folder)
    check_finite(tensors, folder)
    payload = save({name: tensor.float().contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    with atomic_write(folder / TENSORS_NAME, "wb") as file:
        file.write(payload)
    config = {
        "format": FORMAT,
        "method": method.model_dump(mode="json"),
        "backbone": dict(backbone),
        "tensors_sha256": hashlib.sha256(payload).hexdigest(),
        "versions": {name: version(name) for name in ("adept_ds", "torch", "transformers", "deepspeed")},
        **facts,
    }
    write_json(folder / CONFIG_NAME, config)


def adapter_path(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder of an adapter: of a local one itself, of a hub id (`owner/name`, `owner/name@revision`) that in
    the hub's cache, which is filled if need be.

    Raises:
        UserError: The hub has no such repository, or cannot be reached and the adapter is not in the cache.
    """
    named = hub_adapter(source)
    if named is None:
        return Path(source)
    name, tagged = named
    return fetch_files(name, revision or tagged, (CONFIG_NAME, TENSORS_NAME))


def load_adapter(source: str | Path, revision: str | None = None) -> Adapter:
    """Read an adapter folder, or an adapter of the hub; see `adapter_path`.

    Raises:
        UserError: A file is missing or damaged, or the two do not belong together; or as `check_finite` and
            `adapter_path`.
    """
    folder = adapter_path(source, revision)
    config_path, tensors_path = folder / CONFIG_NAME, folder / TENSORS_NAME
    for path in (config_path, tensors_path):
        if not path.is_file():
            is_model = (folder / "config.json").is_file()
            hint = "; it is a whole model, to be given as model.name_or_path" if is_model else ""
            raise UserError(f"{folder} is not an adapter folder: it has no {path.name}{hint}")
    try:
        facts = json.loads(config_path.read_text(encoding="utf-8"))
        written_as = facts.pop("format")
        method = _METHOD_CONFIG.validate_python(facts.pop("method"))
        backbone = facts.pop("backbone")
    except KeyError as error:
        raise UserError(f"{config_path} is not a config of an adept_ds adapter: it has no {error}") from error
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{config_path} is not a config of an adept_ds adapter: {error}") from error
    if written_as != FORMAT:
        raise UserError(f"{config_path} has the format {written_as!r}; this version reads {FORMAT!r}")
    if facts.get("tensors_sha256") != hashlib.sha256(tensors_path.read_bytes()).hexdigest():
        raise UserError(
            f"{tensors_path} is damaged or belongs to another {CONFIG_NAME}: its sha256 is not the one there"
        )
    try:
        tensors = load_file(tensors_path)
    except SafetensorError as error:
        raise UserError(f"{tensors_path} is not a safetensors file: {error}") from error
    check_finite(tensors, folder)
    return Adapter(folder, method, tensors, backbone, facts)


def check_finite(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse an adapter with numbers that are none: every answer of it would be nonsense.

    Raises:
        UserError: Names the tensors.
    """
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"the adapter of {folder} has NaN or infinity in {', '.join(broken)}: a training step has destroyed it; "
            "take an earlier one, or train with a lower train.learning_rate"
        )


def check_backbone(adapter: Adapter, facts: Mapping[str, Any]) -> None:
    """Refuse a backbone that the adapter was not trained on.

    Raises:
        UserError: Width, vocabulary or embedding table differ.
    """
    for key, meaning in (("hidden_size", "embedding width"), ("vocab_size", "vocabulary size")):
        if adapter.backbone.get(key) != facts[key]:
            raise UserError(
                f"{adapter.folder} was trained on {adapter.backbone.get('name_or_path')!r} with {meaning} "
                f"{adapter.backbone.get(key)}; {facts['name_or_path']!r} has {facts[key]}"
            )
    trained_on, given = adapter.backbone.get("embedding_fingerprint"), facts["embedding_fingerprint"]
    if trained_on and given and trained_on not in (given, facts.get("fp16_fingerprint")):
        raise UserError(
            f"{adapter.folder} was trained on {adapter.backbone.get('name_or_path')!r}; {facts['name_or_path']!r} has "
            "the same width and vocabulary but other token embeddings, which the offsets were fitted to"
        )


def check_tensors(values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not exactly those of `shapes`.

    Raises:
        UserError: A name is missing or unknown, or a shape is another one.
    """
    problems = [f"{name} is missing" for name in shapes if name not in values]
    problems += [f"{name} is unknown{did_you_mean(name, shapes)}" for name in values if name not in shapes]
    problems += [
        f"{name} has shape {tuple(values[name].shape)}, expected {shape}"
        for name, shape in shapes.items()
        if name in values and tuple(values[name].shape) != shape
    ]
    if problems:
        raise UserError("the adapter does not fit its own settings: " + "; ".join(problems))

"""`adept_export.json`: what an exported folder was made of, and how it is to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from adept_ds.config.base import validation_problems
from adept_ds.errors import UserError
from adept_ds.files import read_json, write_json

MANIFEST_NAME = "adept_export.json"
FORMAT = "adept_ds-export/1"
SERVING_BASE = "serving-base"


class Manifest(BaseModel):
    """The file's fields."""

    model_config = ConfigDict(extra="forbid")

    format: str = FORMAT
    form: str
    """`folded`, `lora`, `peft`, `gguf`, `onnx`, `openvino` or `serving-base`."""
    base: dict[str, Any]
    """The backbone: name, revision, sizes, fingerprint of its input table, and of its weights."""
    adapter: dict[str, Any] | None = None
    """Folder, sha256 of its tensors, method and its settings, task; none for a serving base."""
    serving_base: str | None = None
    """What a LoRA goes onto."""
    prompt_tokens: Sequence[str] = ()
    prompt_token_ids: Sequence[int] = ()
    """In order; a serving base has as many as the longest prompt may have."""
    prompt_in: str = "none"
    """Who puts the prompt's tokens in front: `both`, the tokenizer (`text`), the chat template (`chat`), or `none`."""
    text_prefix: str | None = None
    """What is put in front of plain text for an engine that does not do so itself; none for other forms."""
    dtype: str
    files: dict[str, str | None]
    """Names of the files with weights to their sha256; none for what is the base's own file."""
    verification: dict[str, Any] | None = None
    """How greedy texts and logits compared with the live model's, and in which engine, if not `transformers` and PEFT;
    none where that was not asked for."""
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Of what wrote the folder."""
    return {name: version(name) for name in ("adept_ds", "torch", "transformers", "peft", "tokenizers")}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the file into an exported folder."""
    write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))


def read_manifest(folder: Path) -> Manifest:
    """Read an exported folder's manifest.

    Raises:
        UserError: There is none, or it is none of this version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"{folder} was not written by `adept-ds export`: it has no {MANIFEST_NAME}")
    values: Mapping[str, Any] = read_json(path)
    if values.get("format") != FORMAT:
        raise UserError(f"{path} has the format {values.get('format')!r}; this version reads {FORMAT!r}")
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path} is not as it should be: {validation_problems(error)}") from None

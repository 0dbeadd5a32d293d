"""The configs that ship with the package, each with what it reproduces, by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
"""`ds_configs` of the repository."""
SCHEMA_NAME = "schema.json"


def shipped_configs() -> dict[str, Path]:
    """Name to file."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.json")) if path.name != SCHEMA_NAME}


def config_path(text: str) -> Path:
    """The file that `--config` means: one that is there, else a shipped one of this name."""
    path = Path(text)
    return path if path.exists() else shipped_configs().get(text.removesuffix(".json"), path)


def purpose(path: Path) -> str:
    """The beginning of what a shipped config says about itself: what it is, without figures and conditions."""
    return re.split(r"[.:;,] | \(", read(path).get("_about", ""), maxsplit=1)[0]


def read(path: Path) -> dict[str, Any]:
    """The settings as they stand in the file, without the reference to the schema beside it."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("$schema", None)
    return values

"""What the declarations in `adept_ds.config` say, by dotted key: for help, for messages, for editors.

python -m adept_ds.config_schema ds_configs/schema.json     writes the JSON schema
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from adept_ds import deepspeed_config
from adept_ds.config import RunConfig
from adept_ds.files import atomic_write

SCHEMA_KEY = "$schema"
"""Editors find the JSON schema by this top-level key of a config file; it is no setting."""


@dataclass(frozen=True)
class Setting:
    """The declaration of one value, as shown in help and messages."""

    key: str
    type: str
    choices: tuple[str, ...]
    default: Any
    required: bool
    doc: str


@cache
def declared_settings() -> dict[str, Setting]:
    """Every setting by its dotted key, in the order of declaration."""
    schema = RunConfig.model_json_schema()
    return {setting.key: setting for setting in _settings(schema, schema["$defs"], "")}


@cache
def section_docs() -> dict[str, str]:
    """Every section by its dotted key, with its documentation."""
    schema = RunConfig.model_json_schema()
    return dict(_sections(schema, schema["$defs"], ""))


def json_schema() -> str:
    """The JSON schema of a config file, for editors and other tools."""
    schema = RunConfig.model_json_schema()
    schema["properties"][SCHEMA_KEY] = {"type": "string", "description": "Where this schema is."}
    return json.dumps(schema, indent=2) + "\n"


def write_schema(path: str | Path) -> None:
    """Write `json_schema` to `path`."""
    with atomic_write(path) as file:
        file.write(json_schema())


def unknown_key_message(key: str) -> str:
    """What to say about a key that no section declares."""
    *others, last = key_candidates(key) or [""]
    if last:
        return (
            f"unknown key; did you mean {', '.join(others)} or {last}?"
            if others
            else f"unknown key; did you mean {last}?"
        )
    parent = key.rpartition(".")[0]
    siblings = [_name(known) for known in _known_keys() if known.rpartition(".")[0] == parent]
    return f"unknown key; expected one of {', '.join(siblings)}"


def key_candidates(key: str) -> list[str]:
    """Keys that may be meant by an unknown one: alike in the same section, of the same name in another, or alike."""
    parent, name = key.rpartition(".")[0], _name(key)
    owner = deepspeed_config.OWNERS.get(name) or deepspeed_config.OWNERS.get(f"{name}.enabled")
    if owner:
        return [owner]
    known = _known_keys()
    siblings = {_name(other): other for other in known if other.rpartition(".")[0] == parent}
    longer = [sibling for sibling in siblings if name in sibling.split("_") or sibling.startswith(f"{name}_")]
    alike = [*difflib.get_close_matches(name, siblings, n=2, cutoff=0.6), *longer]
    elsewhere = [other for other in known if _name(other) == name]
    if alike or elsewhere:
        return list(dict.fromkeys([*(siblings[sibling] for sibling in alike), *elsewhere]))
    anywhere = {_name(other): other for other in known}
    return [anywhere[near] for near in difflib.get_close_matches(name, anywhere, n=1, cutoff=0.8)]


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _known_keys() -> list[str]:
    allowed = deepspeed_config.TOP_LEVEL_KEYS - deepspeed_config.REFUSED_KEYS.keys()
    return [*section_docs(), *declared_settings(), *(f"deepspeed.{name}" for name in sorted(allowed))]


def _settings(schema: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[Setting]:
    for name, field in schema["properties"].items():
        section = _definition(field, definitions)
        if section:
            yield from _settings(section, definitions, f"{prefix}{name}.")
            continue
        yield Setting(
            key=prefix + name,
            type=_type_text(field),
            choices=_choices(field),
            default=field.get("default"),
            required=name in schema.get("required", ()),
            doc=" ".join(field.get("description", "").split()),
        )


def _sections(schema: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in schema["properties"].items():
        section = _definition(field, definitions)
        if section:
            yield prefix + name, " ".join(section["description"].split())
            yield from _sections(section, definitions, f"{prefix}{name}.")


def _definition(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    return definitions[field["$ref"].rpartition("/")[2]] if "$ref" in field else None


def _choices(schema: dict[str, Any]) -> tuple[str, ...]:
    if schema.get("type") == "boolean":
        return ("true", "false")
    return tuple(choice for part in schema.get("anyOf", [schema]) for choice in part.get("enum", ()))


def _type_text(schema: dict[str, Any]) -> str:
    """A JSON schema in words: `integer >= 1 or null`."""
    if "anyOf" in schema:
        return " or ".join(_type_text(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(map(json.dumps, schema.get("enum", [schema.get("const")])))
    if "prefixItems" in schema:
        return "[" + ", ".join(_type_text(part) for part in schema["prefixItems"]) + "]"
    if schema["type"] == "array":
        return f"list of {_type_text(schema['items'])}s"
    if schema["type"] == "boolean":
        return "true or false"
    if schema.get("minLength"):
        return "non-empty string"
    symbols = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{symbol} {schema[name]}" for name, symbol in symbols.items() if name in schema]
    return " ".join([schema["type"], " and ".join(bounds)]).rstrip()


if __name__ == "__main__":
    write_schema(sys.argv[1])

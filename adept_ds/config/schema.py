"""What the declarations of settings say, by dotted key: for help, for messages, for editors.

The settings are those of a run (`adept_ds.config.run`), or of another file that is a `Section` as a whole. What may
stand in a run's section `method` depends on the name there, so the functions take the name of a method.

python -m adept_ds.config.schema ds_configs/schema.json     writes the JSON schema
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from adept_ds.config import deepspeed
from adept_ds.config.base import Section
from adept_ds.config.method import DEFAULT_METHOD
from adept_ds.config.run import RunConfig
from adept_ds.files import atomic_write

SCHEMA_KEY = "$schema"
"""Editors find the JSON schema by this top-level key of a config file; it is no setting."""
BASE_KEY = "_base"
"""Top-level key of a config file with the config that it changes; it is no setting."""


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
def method_docs() -> dict[str, str]:
    """Every method by its name, with its documentation."""
    schema = _schema()
    return {
        name: _one_line(_referenced(reference, schema)["description"]) for name, reference in _methods(schema).items()
    }


@cache
def declared_settings(method: str = DEFAULT_METHOD, model: type[Section] = RunConfig) -> dict[str, Setting]:
    """Every setting of `model` by its dotted key, in the order of declaration."""
    schema = _schema(model)
    return {setting.key: setting for setting in _settings(schema, schema, method, "")}


@cache
def section_docs(model: type[Section] = RunConfig) -> dict[str, str]:
    """Every section of `model` by its dotted key, with its documentation."""
    schema = _schema(model)
    return dict(_sections(schema, schema, ""))


def method_of(values: dict[str, Any]) -> str:
    """Name of the method in settings that may be wrong; the default one where they name none that there is."""
    section = values.get("method")
    name = section.get("name") if isinstance(section, dict) else None
    return name if isinstance(name, str) and name in method_docs() else DEFAULT_METHOD


def json_schema() -> str:
    """The JSON schema of a config file, for editors and other tools."""
    schema = RunConfig.model_json_schema()
    schema["properties"][SCHEMA_KEY] = {"type": "string", "description": "Where this schema is."}
    schema["properties"][BASE_KEY] = {
        "type": "string",
        "description": "The config that this one changes: a file beside it, or the name of one that ships.",
    }
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": [BASE_KEY]}]
    for name, reference in _methods(schema).items():
        if name != DEFAULT_METHOD:
            # Or an object without a name would match more than one alternative.
            schema["$defs"][reference.rpartition("/")[2]]["required"] = ["name"]
    return json.dumps(schema, indent=2) + "\n"


def write_schema(path: str | Path) -> None:
    """Write `json_schema` to `path`."""
    with atomic_write(path) as file:
        file.write(json_schema())


def unknown_key_message(key: str, method: str = DEFAULT_METHOD, model: type[Section] = RunConfig) -> str:
    """What to say about a key that no section declares."""
    *others, last = key_candidates(key, method, model) or [""]
    message = "unknown key"
    if key.startswith("method."):
        message = f"unknown key of method {method!r}"
        owners = [repr(other) for other in method_docs() if key in declared_settings(other)]
        if owners:
            message += f" (method.name {' or '.join(owners)} has it)"
    if last:
        either = f"{', '.join(others)} or " if others else ""
        return f"{message}; did you mean {either}{last}?"
    parent = key.rpartition(".")[0]
    siblings = [_name(known) for known in _known_keys(method, model) if known.rpartition(".")[0] == parent]
    return f"{message}; expected one of {', '.join(siblings)}"


def key_candidates(key: str, method: str = DEFAULT_METHOD, model: type[Section] = RunConfig) -> list[str]:
    """Keys that may be meant by an unknown one: alike in the same section, of the same name in another, or alike."""
    parent, name = key.rpartition(".")[0], _name(key)
    known = _known_keys(method, model)
    owner = deepspeed.OWNERS.get(name) or deepspeed.OWNERS.get(f"{name}.enabled")
    if owner and model is RunConfig:
        return [owner]
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


def _known_keys(method: str, model: type[Section]) -> list[str]:
    known = [*section_docs(model), *declared_settings(method, model)]
    if model is RunConfig:
        allowed = deepspeed.TOP_LEVEL_KEYS - deepspeed.REFUSED_KEYS.keys()
        known += [f"deepspeed.{name}" for name in sorted(allowed)]
    return known


@cache
def _schema(model: type[Section] = RunConfig) -> dict[str, Any]:
    return model.model_json_schema()


def _methods(schema: dict[str, Any]) -> dict[str, str]:
    """Name of each method to the reference of its settings."""
    return schema["properties"]["method"]["discriminator"]["mapping"]


def _referenced(reference: str, schema: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][reference.rpartition("/")[2]]


def _settings(section: dict[str, Any], schema: dict[str, Any], method: str, prefix: str) -> Iterator[Setting]:
    for name, field in section["properties"].items():
        if "discriminator" in field:
            names = tuple(method_docs())
            own = _referenced(_methods(schema)[method], schema)
            for setting in _settings(own, schema, method, f"{prefix}{name}."):
                is_name = setting.key == f"{prefix}{name}.{field['discriminator']['propertyName']}"
                yield replace(setting, type=_one_of(names), choices=names) if is_name else setting
        elif "$ref" in field:
            yield from _settings(_referenced(field["$ref"], schema), schema, method, f"{prefix}{name}.")
        else:
            yield Setting(
                key=prefix + name,
                type=_type_text(field),
                choices=_choices(field),
                default=field.get("default"),
                required=name in section.get("required", ()),
                doc=_one_line(field.get("description", "")),
            )


def _sections(section: dict[str, Any], schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in section["properties"].items():
        if "discriminator" in field:
            yield prefix + name, _one_line(field["description"])
        elif "$ref" in field:
            inner = _referenced(field["$ref"], schema)
            yield prefix + name, _one_line(inner["description"])
            yield from _sections(inner, schema, f"{prefix}{name}.")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _one_of(choices: Iterable[Any]) -> str:
    return "one of " + ", ".join(map(json.dumps, choices))


def _choices(schema: dict[str, Any]) -> tuple[str, ...]:
    if schema.get("type") == "boolean":
        return ("true", "false")
    return tuple(choice for part in schema.get("anyOf", [schema]) for choice in part.get("enum", ()))


def _type_text(schema: dict[str, Any]) -> str:
    """A JSON schema in words: `integer >= 1 or null`."""
    if "anyOf" in schema:
        return " or ".join(_type_text(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return _one_of(schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return "[" + ", ".join(_type_text(part) for part in schema["prefixItems"]) + "]"
    if schema["type"] == "array":
        return f"list of {_type_text(schema['items'])}s"
    if schema["type"] == "boolean":
        return "true or false"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type_text(schema['additionalProperties'])}s"
    if schema.get("minLength"):
        return "non-empty string"
    symbols = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{symbol} {schema[name]}" for name, symbol in symbols.items() if name in schema]
    return " ".join([schema["type"], " and ".join(bounds)]).rstrip()


if __name__ == "__main__":
    write_schema(sys.argv[1])

"""Reads the settings of a run: defaults, then a JSON file, then overrides from the command line.

Every value keeps the place it came from, and all problems are reported together. Nothing here imports torch, so a
mistake is told within a fraction of a second.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from adept_ds.config import deepspeed
from adept_ds.config.base import Section
from adept_ds.config.recipes import config_path, shipped_configs
from adept_ds.config.run import RunConfig
from adept_ds.config.schema import (
    BASE_KEY,
    SCHEMA_KEY,
    Setting,
    declared_settings,
    key_candidates,
    method_of,
    section_docs,
    unknown_key_message,
)
from adept_ds.errors import UserError, did_you_mean
from adept_ds.files import parse_json

COMMAND_LINE = "command line"
DEFAULT = "default"

Model = TypeVar("Model", bound=Section)


@dataclass(frozen=True)
class LoadedConfig:
    """A valid run and where each of its values came from."""

    run: RunConfig
    path: Path
    sources: dict[str, str]
    """Dotted key of every value to its source: `default`, `FILE line N` or `command line`."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read the JSON file `path` and set each override on top.

    An override is `key=value` with a dotted key (`train.learning_rate.soft_prompt=3e-1`). The value is read as JSON,
    and as a string where it is no JSON or where the setting is a string. A later override wins over an earlier one;
    an object replaces what was there, so to keep its siblings name the key inside it. Another `method.name` than the
    file's leaves out what the file says in its section `method`, which is about another method.

    A file with `_base` changes another config: its values are set on top of that one's, section by section, with the
    same rule for `method`.

    Raises:
        UserError: All problems of the file and the overrides: for each its key, value, source, what was expected, and
            the nearest valid key or choice.
    """
    run, sources = load_settings(RunConfig, Path(path), overrides, "--config")
    return LoadedConfig(run, Path(path), sources)


def load_values(values: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> LoadedConfig:
    """As `load_config`, for settings that no file holds.

    Args:
        values: Sections and their settings, as in a file.
        source: Where they come from, for messages.
        overrides: As there.
    """
    own = copy.deepcopy(dict(values))
    run, sources = _load(RunConfig, own, dict.fromkeys(flatten(own), source), overrides, source)
    return LoadedConfig(run, Path(source), sources)


def load_settings(
    model: type[Model], path: Path | None, overrides: Sequence[str], flag: str
) -> tuple[Model, dict[str, str]]:
    """As `load_config`, for any file of settings.

    Args:
        model: What the file holds, as one section.
        path: The file; None for defaults and overrides alone.
        overrides: `key=value`.
        flag: The flag by which the file is given, for messages.

    Returns:
        The settings, and the source of each.

    Raises:
        UserError: As `load_config`.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    problems: list[str] = []
    try:
        if path is not None:
            values, sources, problems = _read_values(model, path, flag)
        return _load(model, values, sources, overrides, str(path or COMMAND_LINE), problems)
    except RecursionError:
        raise UserError(f"{path or COMMAND_LINE}: nested too deeply; expected settings in sections") from None


def _read_values(
    model: type[Section], path: Path, flag: str, above: tuple[Path, ...] = ()
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """A file's values on top of those of its base, the source of each, and problems. `above` are files that it is the
    base of."""
    if path in above:
        raise UserError(f"{path}: {BASE_KEY} leads back to this file; expected a config that stands on its own")
    text = _read(path, flag)
    values = _parse(text, path, model)
    sources, problems = _file_sources(text, path)
    name = values.pop(BASE_KEY, None) if model is RunConfig else None
    if name is None:
        return values, sources, problems
    if not isinstance(name, str):
        raise UserError(f"{path}: {BASE_KEY} is {_show(name)}; expected the name of a config, or a file")
    beside = path.parent / name
    base, base_sources, more = _read_values(
        model, beside if beside.exists() else config_path(name), f"{path}: {BASE_KEY}", (*above, path)
    )
    own_method = values.get("method")
    if isinstance(own_method, dict) and own_method.get("name") not in (None, method_of(base)):
        base["method"] = {}
        base_sources = {key: source for key, source in base_sources.items() if not _is_at(key, "method")}
    _merge(base, values)
    return base, base_sources | sources, [*more, *problems]


def _merge(values: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Set values on top of others, objects member by member."""
    for name, value in own.items():
        inner = values.get(name)
        if isinstance(inner, dict) and isinstance(value, dict):
            _merge(inner, value)
        else:
            values[name] = value


def _load(
    model: type[Model],
    values: dict[str, Any],
    sources: dict[str, str],
    overrides: Sequence[str],
    where: str,
    problems: Sequence[str] = (),
) -> tuple[Model, dict[str, str]]:
    """Set the overrides on top of the values, and check all."""
    pairs = [(key, value) for key, _, value in (override.partition("=") for override in overrides)]
    names = [value for key, value in pairs if key == "method.name"]
    if names and names[-1] != method_of(values):
        _set(values, sources, "method", {"name": names[-1]})
    for key, value in pairs:
        _set(values, sources, key, _override_value(key, value, declared_settings(method_of(values), model)))
    values.pop(SCHEMA_KEY, None)

    loaded, more = _Validation(model, values, sources).result()
    problems = [*problems, *more]
    if problems or loaded is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{where}: {count}\n" + "\n".join(problems))
    dumped = loaded.model_dump(mode="json", by_alias=True)
    return loaded, {key: sources.get(key, DEFAULT) for key in flatten(dumped)}


def resolved_json(run: RunConfig) -> str:
    """The whole run as JSON, defaults included; equal runs give equal text. It loads back as a config file."""
    return json.dumps(run.model_dump(mode="json", by_alias=True), indent=2, sort_keys=True) + "\n"


def config_hash(run: RunConfig) -> str:
    """sha256 of `resolved_json`."""
    return hashlib.sha256(resolved_json(run).encode()).hexdigest()


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key to value for everything that is not an object with members."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _read(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = sorted(path.parent.glob("*.json")) if path.parent.is_dir() else []
        # A name alone may be meant for a config that ships with the package.
        shipped = shipped_configs() if path.name == str(path) and flag == "--config" else {}
        near = did_you_mean(str(path), [*map(str, siblings), *shipped])
        raise UserError(f"{flag} {path}: no such file{near}") from None
    except (PermissionError, NotADirectoryError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror})") from None
    except IsADirectoryError:
        raise UserError(f"{flag} {path}: this is a folder, expected a JSON file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from None


def _parse(text: str, path: Path, model: type[Section]) -> dict[str, Any]:
    try:
        values = parse_json(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if error.lineno <= len(text.splitlines()) else ""
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}\n"
            f"    {line}\n    {' ' * (error.colno - 1)}^"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        sections = section_docs(model)
        kind, names = ("sections", sections) if sections else ("keys", model.model_fields)
        raise UserError(f"{path}: expected an object with the {kind} {', '.join(names)}, got {_show(values)}")
    return values


def _refuse_constant(name: str) -> None:
    raise UserError(f"{name} is not JSON; expected a finite number or null")


def _file_sources(text: str, path: Path) -> tuple[dict[str, str], list[str]]:
    """Return the source of every key of valid JSON text, and a problem for each key that an object has twice."""
    sources: dict[str, str] = {}
    problems: list[str] = []
    key = ""
    members: list[tuple[str, dict[str, int]]] = []
    for token in re.finditer(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}\[\]]', text):
        if token[0] in "{[":
            members.append((key, {}))
        elif token[0] in "}]":
            members.pop()
        elif token[2]:
            parent, lines = members[-1]
            name, line = json.loads(token[1]), text.count("\n", 0, token.start()) + 1
            key = f"{parent}.{name}" if parent else name
            if name in lines:
                problems.append(
                    f"  {key} ({path} lines {lines[name]} and {line})\n      given twice; expected one of the two"
                )
            lines[name] = line
            sources[key] = f"{path} line {line}"
    return sources, problems


def _override_value(key: str, text: str, declared: dict[str, Setting]) -> Any:
    setting = declared.get(key)
    try:
        value = parse_json(text, parse_constant=_refuse_constant)
    except (json.JSONDecodeError, UserError):
        return text
    takes_string = setting is not None and ("string" in setting.type.split() or setting.choices)
    return text if takes_string and isinstance(value, int | float) and not isinstance(value, bool) else value


def _set(values: dict[str, Any], sources: dict[str, str], key: str, value: Any) -> None:
    """Put `value` at a dotted key, creating what is missing on the way."""
    *parents, name = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if not isinstance(inner, dict):
            inner = values[parent] = {}
        values = inner
    values[name] = value
    for stale in [known for known in sources if known.startswith(f"{key}.")]:
        del sources[stale]
    sources[key] = COMMAND_LINE
    if isinstance(value, dict):
        sources |= dict.fromkeys(flatten(value, f"{key}."), COMMAND_LINE)


class _Validation(Generic[Model]):
    """Values checked against what a model declares.

    Args:
        model: The model.
        values: What the file and the overrides say.
        sources: Dotted key of each value to its source.
    """

    def __init__(self, model: type[Model], values: dict[str, Any], sources: dict[str, str]) -> None:
        self.model = model
        self.values = values
        self.sources = sources
        self.method = method_of(values)
        self.declared = declared_settings(self.method, model)

    def result(self) -> tuple[Model | None, list[str]]:
        """Return the settings, or the problems of the values.

        A misspelt or misplaced key would bring a second message where its right name is missing, and hide the checks
        of its section. So what is left is checked with such keys put where they were meant to be.
        """
        loaded, errors = self._loaded_or_errors()
        unknown = [error for error in errors if error["type"] == "extra_forbidden"]
        problems = [self._problem(_key(error), self._unknown_key_message(error)) for error in unknown]
        written = {}
        if unknown:
            self.values = copy.deepcopy(self.values)
            for error in unknown:
                value = _pop(self.values, error["loc"])
                candidates = key_candidates(_key(error), self.method, self.model)
                if len(candidates) != 1:
                    continue
                present = _lookup(self.values, candidates[0])
                if isinstance(present, dict) and isinstance(value, dict):
                    value = value | present
                elif present is not None:
                    continue
                _set(self.values, {}, candidates[0], value)
                written[candidates[0]] = _key(error)
            loaded, errors = self._loaded_or_errors()
        for new, old in written.items():
            moved = {new + key.removeprefix(old): source for key, source in self.sources.items() if _is_at(key, old)}
            self.sources = self.sources | moved
        problems += [self._error_problem(error) for error in errors]
        section = self.values.get("deepspeed")
        if self.model is RunConfig and isinstance(section, dict):
            found = list(deepspeed.section_problems(section))
            if isinstance(loaded, RunConfig):
                found += deepspeed.contradictions(loaded)
            problems += [self._problem(key, message) for key, message in found]
        return (None if problems else loaded), problems

    def _loaded_or_errors(self) -> tuple[Model | None, list[Any]]:
        try:
            return self.model.model_validate(self.values), []
        except ValidationError as error:
            return None, [_as_written(details) for details in error.errors(include_url=False)]

    def _error_problem(self, error: Any) -> str:
        key = _key(error)
        if error["type"] == "extra_forbidden":
            return self._problem(key, self._unknown_key_message(error))
        if error["type"] == "value_error":
            return self._validator_problem(key, str(error["ctx"]["error"]))
        return self._problem(key, self._expectation(error, key))

    def _problem(self, key: str, message: str) -> str:
        parent, _, name = key.rpartition(".")
        siblings = _lookup(self.values, parent) if parent else self.values
        if isinstance(siblings, dict) and name not in siblings:
            return f"  {key}\n      {message}"
        return f"  {key} = {_show(_lookup(self.values, key))} ({_source(key, self.sources)})\n      {message}"

    def _validator_problem(self, section: str, message: str) -> str:
        """A mistake that involves several settings of a section; those that the message names are shown with it."""
        prefix = f"{section}." if section else ""
        lines = [f"  {section or 'sections'}: {message}"]
        for name in dict.fromkeys(re.findall(r"[a-z_]+(?:\.[a-z_]+)*", message)):
            setting = self.declared.get(prefix + name)
            if setting:
                value = _lookup(self.values, setting.key) if setting.key in self.sources else setting.default
                lines.append(f"      {setting.key} = {_show(value)} ({self.sources.get(setting.key, DEFAULT)})")
        return "\n".join(lines)

    def _unknown_key_message(self, error: Any) -> str:
        if "." in error["loc"][-1]:
            return "dotted keys are for the command line; expected objects inside one another"
        return unknown_key_message(_key(error), self.method, self.model)

    def _expectation(self, error: Any, key: str) -> str:
        if error["type"] in ("model_type", "model_attributes_type"):
            members = [known.removeprefix(f"{key}.") for known in self.declared if known.startswith(f"{key}.")]
            names = dict.fromkeys(member.partition(".")[0] for member in members)
            return f"expected an object with the keys {', '.join(names)}"
        setting = self.declared.get(key) or self.declared.get(key.rpartition(".")[0])
        if setting is None:
            return f"section missing: {section_docs(self.model)[key]}"
        if error["type"] == "missing" and setting.key == key:
            return f"missing; expected {setting.type}: {setting.doc}"
        message = f"expected {setting.type}"
        value = error["input"]
        if isinstance(value, str) and setting.choices:
            message += did_you_mean(value.lower(), setting.choices)
        elif isinstance(value, str) and _is_number(value):
            message += "; write the number without quotes"
        return message


def _as_written(error: Any) -> Any:
    """The error at the key where the user wrote the mistake: pydantic has the method's name as a part of its place."""
    location = error["loc"]
    if error["type"] == "union_tag_invalid":
        return error | {"type": "literal_error", "loc": (*location, "name"), "input": error["input"]["name"]}
    return error | {"loc": location[:1] + location[2:]} if location[0:1] == ("method",) else error


def _key(error: Any) -> str:
    return ".".join(map(str, error["loc"]))


def _is_at(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def _lookup(values: Any, key: str) -> Any:
    """The value at a dotted key (list positions included), or None."""
    for name in key.split("."):
        if isinstance(values, dict):
            values = values.get(name)
        elif isinstance(values, list | tuple) and name.isdigit() and int(name) < len(values):
            values = values[int(name)]
        else:
            return None
    return values


def _pop(values: dict[str, Any], location: Sequence[Any]) -> Any:
    *parents, name = location
    for parent in parents:
        values = values[parent]
    return values.pop(name)


def _source(key: str, sources: dict[str, str]) -> str:
    while key not in sources:
        if "." not in key:
            return DEFAULT
        key = key.rpartition(".")[0]
    return sources[key]


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text) is not None

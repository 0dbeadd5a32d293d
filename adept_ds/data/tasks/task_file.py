"""A task by its name in the registry, or by the JSON file that declares a user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adept_ds.data.tasks.registry import TASKS
from adept_ds.data.tasks.task import Task
from adept_ds.errors import UserError, did_you_mean
from adept_ds.files import parse_json
from adept_ds.formats import names_with_tests


def find_task(name: str) -> Task:
    """Return the task that an entry of `data.tasks` means: a name of the registry, or a JSON file.

    Raises:
        UserError: The name is unknown, or the file is not there or not a valid declaration (names every mistake).
    """
    if name in TASKS:
        return TASKS[name]
    if name.endswith(".json"):
        return read_task_file(Path(name))
    benchmarks = [other for other in names_with_tests() if name in (other, other.partition("-")[0])]
    if benchmarks:
        raise UserError(
            f"data.tasks: the programs of {name} are run, not compared; expected data.format {' or '.join(benchmarks)}"
        )
    raise UserError(
        f"data.tasks: unknown task {name!r}; expected one of {', '.join(TASKS)}, or a JSON file that declares one"
        + did_you_mean(name.lower(), TASKS)
    )


def read_task_file(path: Path) -> Task:
    """Read a user's own task. Its files are relative to the folder of the declaration.

    Raises:
        UserError: The file is not there, is no JSON object, or has mistakes; all of them are named.
    """
    try:
        values = parse_json(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    except FileNotFoundError:
        siblings = map(str, path.parent.glob("*.json"))
        raise UserError(f"data.tasks: {path}: no such file{did_you_mean(str(path), siblings)}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object with the fields of a task, got {type(values).__name__}")
    values = {"name": path.stem, **values}
    if isinstance(values.get("files"), dict):
        folder = path.parent
        values["files"] = {
            part: str(folder / file) if isinstance(file, str) else file for part, file in values["files"].items()
        }
    try:
        task = Task.model_validate(values)
        task.variant("faithful")
    except ValidationError as error:
        mistakes = [_mistake(problem, values) for problem in error.errors(include_url=False)]
        raise UserError("\n".join([f"{path}: {len(mistakes)} mistake(s)", *mistakes])) from None
    return task


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{twice[0]!r} is given twice")
    return dict(pairs)


def _mistake(problem: Any, values: dict[str, Any]) -> str:
    """One line on one of pydantic's errors: the key, its value, what was expected."""
    key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    if problem["type"] == "extra_forbidden":
        near = did_you_mean(key, Task.model_fields)
        return f"  {key}: unknown field" + (near or f"; expected one of {', '.join(Task.model_fields)}")
    if problem["type"] == "missing":
        return f"  {key}: missing; {Task.model_fields[key].description}"
    if problem["type"] == "value_error":
        return f"  {problem['ctx']['error']}"
    value = json.dumps(problem["input"], ensure_ascii=False, default=str)
    expected = problem["msg"][0].lower() + problem["msg"][1:]
    choices = problem.get("ctx", {}).get("expected", "")
    near = did_you_mean(str(problem["input"]), choices.replace("'", "").replace(" or ", ", ").split(", "))
    return f"  {key} = {value}: {expected}{near if choices else ''}"

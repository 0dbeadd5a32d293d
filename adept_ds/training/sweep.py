"""A sweep: one config and a grid of settings, expanded into runs, and what came of them.

A grid maps settings to lists of values, and every combination is a run (a member of the sweep). Settings that go
together are one key, their names joined by commas, with a list of rows:

    {
      "method.num_virtual_tokens, method.bottleneck": [[20, 39], [40, 29], [60, 19], [80, 9]],
      "train.learning_rate.soft_prompt": [0.3, 0.4, 0.5],
      "train.seed": [1, 2, 3]
    }

A list of such objects is all their members together: methods with settings of their own, for example. The folder
`logging.run_dir` of the config is the sweep's; every member has a run folder in it, named after its settings.

    NAME/            run folder of a member                configs/NAME.json    its whole config
    sweep.json       all members and the best settings     sweep.txt            the same as a table
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from adept_ds.config.loader import COMMAND_LINE, LoadedConfig, flatten, load_config, resolved_json
from adept_ds.config.run import RunConfig
from adept_ds.config.schema import declared_settings, method_docs, unknown_key_message
from adept_ds.errors import UserError, did_you_mean
from adept_ds.files import atomic_write, parse_json, read_json, write_json
from adept_ds.storage.run_folder import MAY_CHANGE, SEED_KEYS, STATUS_NAME

Grid = Mapping[str, Sequence[Any]]
"""Setting, or settings joined by commas, to its values or rows of values."""

ABOUT_KEY = "_about"
NAMES_LENGTH = 120
"""Longest part of a member's name that shows its settings; the hash behind it tells members apart."""
SHOWN_PROBLEMS = 5
CONTEST_PREFIXES = ("model.", "data.", "eval.", "method.name")
"""Settings that make figures incomparable, or whose values are themselves compared: each combination has a best."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    """Name of its run folder; follows from the settings alone."""
    settings: dict[str, Any]
    """The grid's settings with this member's values, sorted by key."""
    run: RunConfig
    """The whole config."""

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.run.logging.run_dir)

    @property
    def lower_is_better(self) -> bool:
        """Whether the validation figure is a loss."""
        return self.run.eval.metric == "loss"

    def without_seeds(self) -> dict[str, Any]:
        """The grid's settings but for the seeds."""
        return {key: value for key, value in self.settings.items() if key not in SEED_KEYS}

    def contest(self) -> dict[str, Any]:
        """The settings among which the best of the others is looked for."""
        return {key: value for key, value in self.without_seeds().items() if key.startswith(CONTEST_PREFIXES)}


@dataclass(frozen=True)
class Outcome:
    """Where a member's run stands, from its `status.json`."""

    state: str
    """`waiting` if it has not started, `running` (or killed), `interrupted`, `failed` or `finished`."""
    step: int = 0
    total_steps: int | None = None
    best_step: int | None = None
    best_value: float | None = None
    """The validation figure (`eval.metric`) of the best checkpoint."""
    error: str | None = None


def read_grid(items: Sequence[str]) -> list[Grid]:
    """Read what stands behind `--grid`: one file, or `key=[...]` items, which are one grid together.

    Raises:
        UserError: A file is not there or holds no grid, or an item is none.
    """
    if len(items) == 1 and "=" not in items[0]:
        return _read_grid_file(Path(items[0]))
    grid: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--grid {item}: expected key=[values], or a single JSON file")
        if key in grid:
            raise UserError(f"--grid {key}: given twice; expected one list with all values")
        try:
            grid[key] = parse_json(text)
        except json.JSONDecodeError:
            raise UserError(f"--grid {key}: {text!r} is not JSON; expected a list such as {key}=[1, 2]") from None
    return [grid]


def _read_grid_file(path: Path) -> list[Grid]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        near = did_you_mean(str(path), map(str, path.parent.glob("*.json")))
        raise UserError(f"--grid {path}: no such file (and no key=[values]){near}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--grid {path}: {error}") from None
    grids = value if isinstance(value, list) else [value]
    if not grids or not all(isinstance(grid, dict) for grid in grids):
        raise UserError(f"--grid {path}: expected an object {{key: [values]}}, or a list of such objects")
    return [{key: values for key, values in grid.items() if key != ABOUT_KEY} for grid in grids]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name!r} is given twice; expected one list with all values")
    return dict(pairs)


def members(loaded: LoadedConfig, grids: Sequence[Grid]) -> list[Member]:
    """Expand a sweep into its runs, each checked as `load_config` checks it.

    Args:
        loaded: The config that all members share, its overrides of the command line included.
        grids: As `read_grid` returns them. The first setting varies slowest; a run that several combinations describe
            is one member.

    Raises:
        UserError: All problems of the grids, or else those of the members' configs.
    """
    resolved = flatten(loaded.run.model_dump(mode="json", by_alias=True))
    shared = [key for key, source in loaded.sources.items() if source == COMMAND_LINE]
    overrides = [f"{key}={_written(resolved[key])}" for key in shared]
    combinations = [combination for grid in grids for combination in _combinations(grid)]
    found: dict[str, Member] = {}
    problems: dict[str, str] = {}
    for combination in combinations:
        try:
            varied = [f"{key}={_written(value)}" for key, value in combination.items()]
            run = load_config(loaded.path, [*overrides, *varied]).run
        except UserError as error:
            # One line a problem begins with two spaces, its continuation with more; the same one may be many members'.
            for problem in re.split(r"\n(?=  \S)", str(error))[1:]:
                problems.setdefault(problem.replace(f"({COMMAND_LINE})", "(grid or command line)"), ", ".join(varied))
            continue
        member = _member(run, list(combination))
        found.setdefault(member.name, member)
    if problems:
        shown = [f"{problem}\n      (first in the member {who})" for problem, who in problems.items()][:SHOWN_PROBLEMS]
        left = len(problems) - len(shown)
        raise UserError("\n".join([f"{loaded.path} with the grid:", *shown, *[f"... and {left} more"] * bool(left)]))
    return list(found.values())


def _combinations(grid: Grid) -> list[dict[str, Any]]:
    """Every member's settings. UserError with all that is wrong with the grid."""
    problems: list[str] = []
    columns: list[list[dict[str, Any]]] = []
    seen: set[str] = set()
    for joined, values in grid.items():
        keys = [key.strip() for key in joined.split(",")]
        for key in keys:
            if key in seen:
                problems.append(f"{key}: in the grid twice")
            elif key.startswith("logging."):
                problems.append(f"{key}: not for a grid; every member has a run folder of its own in logging.run_dir")
            elif not _is_known(key):
                problems.append(f"{key}: {unknown_key_message(key)}")
            seen.add(key)
        if not isinstance(values, list) or not values:
            problems.append(f"{joined} = {json.dumps(values)}: expected a list with one value or more")
            continue
        rows = [[value] for value in values] if len(keys) == 1 else values
        short = [row for row in rows if not isinstance(row, list) or len(row) != len(keys)]
        if short:
            problems.append(f"{joined}: {json.dumps(short[0])} is no list of {len(keys)} values, one for each setting")
            continue
        columns.append([dict(zip(keys, row, strict=True)) for row in rows])
    if problems:
        raise UserError("--grid: " + "\n        ".join(problems))
    return [dict(itertools.chain.from_iterable(row.items() for row in rows)) for rows in itertools.product(*columns)]


def _is_known(key: str) -> bool:
    """Whether any method's run has the setting; whether this one's has, `load_config` says."""
    in_objects = ("deepspeed.", "data.hub_ids.", "train.schedule_options.")
    return key.startswith(in_objects) or any(key in declared_settings(method) for method in method_docs())


def _written(value: Any) -> str:
    """A value as an override is written: strings without quotes, unless they would be read as something else."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except json.JSONDecodeError:
            return value
    return json.dumps(value)


def _member(run: RunConfig, keys: Sequence[str]) -> Member:
    resolved = flatten(run.model_dump(mode="json", by_alias=True))
    # A setting that is an object is not in `resolved` itself.
    settings = {key: resolved.get(key, _lookup(run, key)) for key in sorted(keys)}
    name = _name(run, settings)
    logging = run.logging.model_copy(update={"run_dir": str(Path(run.logging.run_dir) / name)})
    return Member(name, settings, run.model_copy(update={"logging": logging}))


def _lookup(run: RunConfig, key: str) -> Any:
    value: Any = run.model_dump(mode="json", by_alias=True)
    for part in key.split("."):
        value = value[part]
    return value


def _name(run: RunConfig, settings: Mapping[str, Any]) -> str:
    """The grid's settings for people, and a hash of all that makes a run another one.

    Settings at their defaults are left out of the hash, so that a setting that is new in a later version changes no
    name; so are settings that a resumed run may have other values of.
    """
    written = flatten(run.model_dump(mode="json", by_alias=True, exclude_defaults=True))
    hashed = {key: value for key, value in written.items() if not key.startswith(MAY_CHANGE)}
    hashed |= {"method.name": run.method.name, "model": Path(run.model.name_or_path).name, "grid": settings}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:8]
    parts = [
        _slug(value) if key == "method.name" else f"{key.rpartition('.')[2]}_{_slug(value)}"
        for key, value in settings.items()
    ]
    return "-".join(["-".join(parts)[:NAMES_LENGTH].rstrip("-"), digest])


def _slug(value: Any) -> str:
    text = Path(value).name if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")


def write_config(member: Member, folder: Path) -> Path:
    """Write a member's whole config into `folder`, for the launcher; return its path."""
    path = folder / "configs" / f"{member.name}.json"
    with atomic_write(path) as file:
        file.write(resolved_json(member.run))
    return path


def read_outcome(member: Member) -> Outcome:
    """Read where a member's run stands."""
    path = member.run_dir / STATUS_NAME
    if not path.is_file():
        return Outcome("waiting")
    status = read_json(path)
    return Outcome(**{key: status[key] for key in Outcome.__dataclass_fields__ if key in status})


@dataclass(frozen=True)
class SeedGroup:
    """Members that differ in their seeds alone."""

    settings: dict[str, Any]
    contest: dict[str, Any]
    members: tuple[Member, ...]
    values: tuple[float, ...]
    """Validation figures of the members that are finished."""
    is_best: bool = False
    """Whether it is the best of its contest; only settings whose members are all finished take part."""

    @property
    def mean(self) -> float | None:
        """Mean of the figures."""
        return mean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Their standard deviation (n - 1); None for fewer than two."""
        return stdev(self.values) if len(self.values) > 1 else None


def compare_settings(found: Sequence[Member], outcomes: Mapping[str, Outcome]) -> list[SeedGroup]:
    """Average the validation figures over seeds, and mark the best setting of each contest.

    Methods, tasks and backbones are contests of their own: their figures are not comparable, or it is they that are
    compared later, each at its best.
    """
    groups: dict[str, list[Member]] = {}
    for member in found:
        groups.setdefault(json.dumps(member.without_seeds()), []).append(member)
    settings = []
    for group in groups.values():
        finished = [outcomes[member.name] for member in group if outcomes[member.name].state == "finished"]
        values = tuple(outcome.best_value for outcome in finished if outcome.best_value is not None)
        settings.append(SeedGroup(group[0].without_seeds(), group[0].contest(), tuple(group), values))
    best: dict[str, SeedGroup] = {}
    for setting in settings:
        if len(setting.values) == len(setting.members):
            contest = json.dumps(setting.contest)
            rival = best.get(contest)
            if rival is None or _score(setting) > _score(rival):
                best[contest] = setting
    return [replace(setting, is_best=setting in best.values()) for setting in settings]


def _score(setting: SeedGroup) -> float:
    figure = mean(setting.values)
    return -figure if setting.members[0].lower_is_better else figure


def summary(found: Sequence[Member]) -> tuple[dict[str, Any], str]:
    """All members and settings as they stand now: as a JSON object, and as a table."""
    outcomes = {member.name: read_outcome(member) for member in found}
    settings = compare_settings(found, outcomes)
    as_json = {
        "metric": found[0].run.eval.metric,
        "members": [
            {"name": member.name, "run_dir": str(member.run_dir), "settings": member.settings}
            | asdict(outcomes[member.name])
            for member in found
        ],
        "settings": [
            {
                "settings": setting.settings,
                "members": [member.name for member in setting.members],
                "finished": len(setting.values),
                "mean": setting.mean,
                "standard_deviation": setting.deviation,
                "best": setting.is_best,
            }
            for setting in settings
        ],
    }
    return as_json, _table(found, outcomes, settings)


def write_tables(found: Sequence[Member], folder: Path) -> str:
    """Write `sweep.json` and `sweep.txt` into the sweep's folder; return the latter's text."""
    as_json, text = summary(found)
    write_json(folder / "sweep.json", as_json)
    with atomic_write(folder / "sweep.txt") as file:
        file.write(text)
    return text


def _table(found: Sequence[Member], outcomes: Mapping[str, Outcome], settings: Sequence[SeedGroup]) -> str:
    metric = found[0].run.eval.metric
    keys = list(dict.fromkeys(key for member in found for key in member.settings))
    rows = [["state", "step", metric, *(_short(key, keys) for key in keys), "run"]]
    for member in found:
        outcome = outcomes[member.name]
        step = "" if outcome.total_steps is None else f"{outcome.step}/{outcome.total_steps}"
        values = [_text(member.settings.get(key)) for key in keys]
        rows.append([outcome.state, step, _figure(outcome.best_value), *values, member.name])
    lines = _aligned(rows)
    lines += [f"{name}: {outcome.error}" for name, outcome in outcomes.items() if outcome.error]
    keys = [key for key in keys if key not in SEED_KEYS]
    rows = [["best", "runs", metric, "deviation", *(_short(key, keys) for key in keys)]]
    for setting in settings:
        runs = f"{len(setting.values)}/{len(setting.members)}"
        values = [_text(setting.settings.get(key)) for key in keys]
        rows.append(["*" * setting.is_best, runs, _figure(setting.mean), _figure(setting.deviation), *values])
    direction = "lower" if found[0].lower_is_better else "higher"
    title = f"validation {metric} ({direction} is better), mean over seeds; * best of its method, data and model"
    return "\n".join([*lines, "", title, *_aligned(rows)]) + "\n"


def _short(key: str, keys: Sequence[str]) -> str:
    name = key.rpartition(".")[2]
    return name if sum(other.rpartition(".")[2] == name for other in keys) == 1 else key


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

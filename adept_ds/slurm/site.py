"""What belongs to a cluster and not to a run: one small JSON file, the site.

It is named by `--site`, else by $ADEPT_DS_SITE, else it is `launchers/slurm/site.json` of the repository or
`~/.config/adept_ds/site.json` if one of them is there. Every key is a flag of `adept-ds submit` too, which has the last
word.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, StrictBool, ValidationInfo, field_validator

from adept_ds.config.base import Count, CountOrZero, Section, parse_bytes
from adept_ds.config.loader import load_settings
from adept_ds.errors import UserError
from adept_ds.rank_environment import RANK_VARIABLES

SITE_VARIABLE = "ADEPT_DS_SITE"
SITE_NAME = Path("launchers") / "slurm" / "site.json"
"""In the repository."""
USER_SITE = Path("~/.config/adept_ds/site.json")

SITE_SECTION = "cluster"
"""What `--help` takes for the keys of a site."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class SiteConfig(Section):
    """A SLURM cluster, as submissions need to know it."""

    about: str = Field(default="", alias="_about")
    """What the file is for. JSON has no comments."""
    partition: str | None = None
    """Partition of jobs on GPUs; the cluster's default if not given."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes with GPUs must have."""
    time: str = "24:00:00"
    """Time limit of a try, in one of SLURM's forms; a run that needs longer requeues itself and goes on."""
    eval_partition: str | None = None
    """Partition of evaluations on GPUs; `partition` if not given."""
    eval_account: str | None = None
    """Account that pays for evaluations; `account` if not given."""
    eval_qos: str | None = None
    """Quality of service of evaluations; `qos` if neither this nor `eval_partition` is given."""
    eval_constraint: str | None = None
    """Features that nodes of evaluations must have; `constraint` if neither this nor `eval_partition` is given."""
    eval_time: str | None = None
    """Time limit of evaluations; `time` if not given."""
    cpu_partition: str | None = None
    """Partition without GPUs, for scoring and reports; `partition` if not given."""
    cpu_account: str | None = None
    """Account that pays for jobs without GPUs; `account` if not given."""
    cpu_qos: str | None = None
    """Quality of service of jobs without GPUs; `qos` if neither this nor `cpu_partition` is given."""
    cpu_constraint: str | None = None
    """Features that nodes of jobs without GPUs must have; `constraint` if neither this nor `cpu_partition` is given."""
    cpu_time: str = "02:00:00"
    """Time limit of jobs without GPUs."""
    gpus_per_node: CountOrZero = 8
    """GPUs to ask for on each node; 0 trains on CPUs."""
    gpu_memory: str | None = None
    """Memory of a GPU, such as 80GB: the planner then says before the job is submitted whether the run fits."""
    gpu_type: str | None = None
    """SLURM's name of the GPUs, where a cluster has several kinds."""
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """Whether GPUs are asked for by --gpus-per-node or by --gres."""
    tasks_per_node: Count | None = None
    """Ranks on each node; one a GPU if not given, or one if there is no GPU."""
    cpus_per_task: Count = 8
    """CPU cores of each rank."""
    score_cpus: Count = 8
    """CPU cores of the job that runs generated programs; it runs as many at a time."""
    mem: str | None = None
    """Host memory to ask for on each node that trains, as for --mem; 0 is all of it."""
    exclusive: StrictBool = False
    """Take whole nodes for training and generation."""
    modules: tuple[str, ...] = ()
    """Environment modules to load."""
    setup: tuple[str, ...] = ()
    """Lines of bash to run on a job's first node once the modules are loaded. They are taken as they are."""
    container: str | None = None
    """Image that ranks run in."""
    container_runtime: Literal["command", "pyxis"] = "command"
    """Whether `container_command` starts the image, or srun by the plugin pyxis (enroot)."""
    container_command: str = "apptainer exec --nv"
    """What stands in front of the image: the container's program with its options."""
    container_mounts: tuple[str, ...] = ()
    """Folders that a container sees beside those of the run, as FOLDER or FOLDER:WHERE."""
    python: str | None = None
    """Interpreter; the one that submits if not given, or python3 in a container."""
    env: dict[str, str] = Field(default={})
    """Environment variables, for ranks on all nodes: NCCL_SOCKET_IFNAME, HF_HOME, ... A $NAME in a value is that
    variable, anything else stands for itself."""
    offline: StrictBool = False
    """Nodes without internet: nothing is asked of the hub (HF_HUB_OFFLINE); `submit.py prefetch` fetches it before."""
    scratch: str | None = None
    """Folder on each node's own disk, for caches whose locks hang on network file systems. May hold $NAME."""
    stage_weights: StrictBool = False
    """Copy the weights to `scratch` once a node, and read them from there."""
    warning_seconds: Count = 300
    """So long before the time limit a run is told to save; at least twice what a step and a save take."""
    max_restarts: CountOrZero = 20
    """A job that has been requeued so often is not requeued again."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch for every job, such as --mail-type=END."""

    @field_validator("*")
    @classmethod
    def _check_lines(cls, value: Any, info: ValidationInfo) -> Any:
        texts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        for text in texts:
            if isinstance(text, str) and info.field_name != "about" and (_CONTROL.search(text) or not text.strip()):
                raise ValueError(f"{json.dumps(text)}: expected one line with something in it")
        return value

    @field_validator("time", "eval_time", "cpu_time")
    @classmethod
    def _check_time(cls, value: str | None) -> str | None:
        if value is not None:
            parse_time(value)
        return value

    @field_validator("gpu_memory")
    @classmethod
    def _check_memory(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @field_validator("env")
    @classmethod
    def _check_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of an environment variable")
            if name in RANK_VARIABLES:
                raise ValueError(f"{name} differs from rank to rank or job to job, and is set by the job itself")
        return value

    @field_validator("extra")
    @classmethod
    def _check_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            if not option.startswith("-"):
                raise ValueError(f"{option!r}: expected an option of sbatch, such as --mail-type=END")
        return value

    @field_validator("container")
    @classmethod
    def _check_image(cls, value: str | None) -> str | None:
        if value is not None and " " in value:
            raise ValueError(f"{value!r} has a space in it, at which the batch scripts would cut it")
        return value

    @field_validator("container_mounts")
    @classmethod
    def _check_mounts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for mount in value:
            if "," in mount or not mount.startswith("/"):
                raise ValueError(f"{mount!r}: expected an absolute path, FOLDER or FOLDER:WHERE, without a comma")
        return value

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    def expanded_env(self) -> dict[str, str]:
        """The environment variables as they are on this machine, with those that follow from other keys."""
        offline = {"HF_HUB_OFFLINE": "1"} if self.offline else {}
        return {name: os.path.expandvars(value) for name, value in (offline | self.env).items()}


def parse_time(text: str) -> float:
    """Return a time limit in one of SLURM's forms in seconds.

    Raises:
        ValueError: It is in none of them.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"{text!r}: expected a time such as 30 (minutes), 02:00:00 or 1-12:00:00 (days-hours)")
    days, *rest = match.groups()
    first, second, third = (int(part or 0) for part in rest)
    if days is not None:
        return int(days) * 86_400 + first * 3_600 + second * 60 + third
    return first * 3_600 + second * 60 + third if rest[2] else first * 60 + second


def add_site_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--site` and a flag for each key of a site, which are many: their help is `site_help`."""
    parser.add_argument(
        "--site",
        metavar="FILE",
        type=Path,
        help=f"the cluster (default: ${SITE_VARIABLE}, else {SITE_NAME} or {USER_SITE}, if it is there); "
        f"--help {SITE_SECTION} tells its keys, each of which is a flag too",
    )
    _add_keys(parser, is_shown=False)


def site_help() -> str:
    """The flags for the keys of a site."""
    parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    _add_keys(parser, is_shown=True)
    return f"keys of the site file, and flags:\n{parser.format_help().partition(':')[2]}"


def _add_keys(parser: argparse.ArgumentParser, is_shown: bool) -> None:
    for name, field in SiteConfig.model_fields.items():
        if name == "about":
            continue
        options: dict[str, Any] = {"metavar": "VALUE"}
        if isinstance(field.default, tuple | dict):
            options = {"nargs": "+", "action": "extend", "metavar": "NAME=VALUE" if name == "env" else "VALUE"}
        elif isinstance(field.default, bool):
            options = {"nargs": "?", "const": "true", "metavar": "true|false"}
        text = (field.description or "").replace("%", "%%")
        parser.add_argument(f"--{name}", help=text if is_shown else argparse.SUPPRESS, **options)


def load_site(flags: argparse.Namespace, root: Path | None) -> SiteConfig:
    """The site that the flags name, or the default one, with the flags' own values on top.

    Args:
        flags: What `add_site_flags` has added.
        root: The repository, if there is one.

    Raises:
        UserError: All problems of the file and the flags.
    """
    path = flags.site or (Path(os.environ[SITE_VARIABLE]) if os.environ.get(SITE_VARIABLE) else None)
    defaults = [*([root / SITE_NAME] if root else []), USER_SITE.expanduser()]
    path = path or next(filter(Path.is_file, defaults), None)
    overrides = []
    for name, field in SiteConfig.model_fields.items():
        value = getattr(flags, name, None)
        if name == "env":
            for item in value or ():
                variable, equals, text = item.partition("=")
                if not equals:
                    raise UserError(f"--env {item}: expected NAME=VALUE")
                overrides.append(f"env.{variable}={json.dumps(text)}")
        elif isinstance(field.default, tuple) and value is not None:
            overrides.append(f"{name}={json.dumps(value)}")
        elif value is not None:
            overrides.append(f"{name}={value}")
    site, _ = load_settings(SiteConfig, path, overrides, "--site")
    return site

"""The folder of a run: who may write to it, which config it belongs to, what it holds, and how its last try ended."""

from __future__ import annotations

import errno
import fcntl
import getpass
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from adept_ds.config.loader import flatten
from adept_ds.config.run import RunConfig
from adept_ds.errors import UserError
from adept_ds.files import read_json, write_json

CONFIG_NAME = "config.json"
STATUS_NAME = "status.json"
METRICS_NAME = "metrics.jsonl"
CHECKPOINTS_NAME = "checkpoints"
CHECKPOINT_PREFIX = "step-"
MANIFEST = "manifest.json"
"""In a checkpoint: each of its files with its `file_proof`."""
SHARDED = "deepspeed"
"""Folder of DeepSpeed's own checkpoint within a checkpoint."""
LOCK_NAME = ".lock"
TRY_NAME = Path("slurm") / "try"
"""Under SLURM, the newest of the run's tries; `TRY_VARIABLE` says to a rank which one it belongs to."""
TRY_VARIABLE = "ADEPT_DS_TRY"

MAY_CHANGE = (
    "_about",
    "deepspeed",
    "eval.batch_size",
    "eval.every_steps",
    "eval.generation.batch_size",
    "eval.sandbox",
    "logging",
    "model.attn_implementation",
    "model.name_or_path",
    "model.quantized_cache",
    "train.activation_checkpointing",
    "train.gradient_accumulation_steps",
    "train.keep_checkpoints",
    "train.micro_batch_size",
    "train.save_every",
    "train.sharding",
)
"""Settings that a resumed run may have other values of: none of them changes what is trained on which examples."""

SEED_KEYS = ("train.seed", "data.k_shot_seed")
"""Settings that only repeat a measurement: figures are averaged over them before anything is compared."""


class RunFolder:
    """A run folder. Rank 0 opens it, and then holds it until it ends.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS_NAME
        self.best = path / "best"
        self._lock: IO[str] | None = None

    def open(self, config: dict[str, Any], resume: str) -> None:
        """Take the folder for a new run, or for going on with its own, and store the resolved config. It is made if it
        is not there.

        Args:
            config: The resolved config.
            resume: `never` wants a folder without a run; anything else also takes one that holds this run, see
                `find_checkpoint`.

        Raises:
            UserError: Another process holds the folder; or the folder holds a run and `resume` is `never`, or a run
                with other settings.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock, holder = _take_lock(self.path, warn=print)
        if holder:
            raise UserError(f"logging.run_dir is {str(self.path)!r}, where another process is training now: {holder}")
        stored = self.path / CONFIG_NAME
        if stored.is_file():
            if resume == "never":
                raise UserError(
                    f"logging.run_dir is {str(self.path)!r}, which holds a run already: go on with it by "
                    "--resume auto, or choose another folder by --logging.run_dir"
                )
            check_same_run(self.path, config)
        write_json(stored, config)

    def newer_try(self, environment: Mapping[str, str]) -> str | None:
        """The try that has taken the folder over from the one that this process belongs to; None if there is none.

        A node that SLURM cannot reach is given up, and its job started again elsewhere, while its ranks may train on.
        """
        own = environment.get(TRY_VARIABLE)
        if own is None:
            return None
        try:
            newest = (self.path / TRY_NAME).read_text(encoding="utf-8").strip()
        except OSError:  # a file system that is away for a moment is no reason to stop
            return None
        return newest if newest != own else None

    def status(self) -> dict[str, Any]:
        """How the last try ended; empty if none has."""
        return read_status(self.path)

    def set_status(self, state: str, step: int, total_steps: int, **facts: Any) -> None:
        """Write `status.json`; `state` is running, interrupted, finished, or failed."""
        write_json(self.path / STATUS_NAME, {"state": state, "step": step, "total_steps": total_steps, **facts})


def lock_holder(run_dir: Path, warn: Callable[[str], Any]) -> str | None:
    """Who trains in a run folder at this moment, as far as its lock says; None if nobody does.

    Args:
        run_dir: The folder, which is there.
        warn: Called with a line where the file system has no locks.
    """
    lock, holder = _take_lock(run_dir, warn)
    lock.close()
    return holder


def _take_lock(run_dir: Path, warn: Callable[[str], Any]) -> tuple[IO[str], str | None]:
    """The lock's open file, held until it is closed, and None; or, where another process holds it, who that is."""
    path = run_dir / LOCK_NAME
    lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            return lock, lock.read().strip() or f"it holds {path} and does not say who it is"
        warn(f"{path}: the file system has no locks ({error.strerror}), so a second writer would not be noticed")
    lock.truncate(0)
    job = os.environ.get("SLURM_JOB_ID")
    lock.write(f"process {os.getpid()} of {_user()} on {platform.node()}{f', SLURM job {job}' if job else ''}\n")
    lock.flush()
    return lock, None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        return f"user {os.getuid()}"


def check_same_run(run_dir: Path, config: dict[str, Any]) -> None:
    """Refuse to go on with a run with other settings than those of `MAY_CHANGE`.

    Raises:
        UserError: All settings that differ from those of the folder's run.
    """
    before, after = flatten(_with_defaults(read_json(run_dir / CONFIG_NAME))), flatten(config)
    differing = [
        f"{key} was {before.get(key)!r} and is now {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if differing:
        raise UserError(
            f"logging.run_dir is {str(run_dir)!r}, which holds a run with other settings: "
            f"{'; '.join(differing)}. Put them back, or choose another folder by --logging.run_dir"
        )


def _with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the settings that are new since it was written; as it is if it is no longer a valid one."""
    try:
        return RunConfig.model_validate(stored).model_dump(mode="json", by_alias=True)
    except ValidationError:
        return stored


def read_status(run_dir: Path) -> dict[str, Any]:
    """How the last try of a run ended; empty if none has."""
    path = run_dir / STATUS_NAME
    return read_json(path) if path.is_file() else {}


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders below `root`, oldest first, whether whole or damaged. Anything by another name is not ours."""
    if not root.is_dir():
        return []
    name = re.compile(rf"{CHECKPOINT_PREFIX}\d{{8,}}")
    return sorted(folder for folder in root.iterdir() if name.fullmatch(folder.name) and folder.is_dir())


def newest_step(run_dir: Path) -> int:
    """Step that a run would go on from by its newest whole checkpoint; 0 if it has none."""
    folders = reversed(list_checkpoints(run_dir / CHECKPOINTS_NAME))
    whole = next((folder for folder in folders if checkpoint_damage(folder) is None), None)
    return int(whole.name.removeprefix(CHECKPOINT_PREFIX)) if whole else 0


def checkpoint_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None if every file is the one that was written."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{folder} is not a whole checkpoint: it has no {MANIFEST}"
    try:
        proofs: dict[str, str | int] = json.loads(manifest.read_text(encoding="utf-8"))
        damaged = [
            name for name, proof in proofs.items() if not (folder / name).is_file() or file_proof(folder, name) != proof
        ]
    except (ValueError, AttributeError) as error:
        return f"{manifest} is damaged: {error}"
    return f"{folder} is damaged: {', '.join(damaged)} missing or changed since it was written" if damaged else None


def file_proof(folder: Path, name: str) -> str | int:
    """What a checkpoint's file is recognised by: its sha256, or its size for those of DeepSpeed, which hold the model
    several times over and would take minutes to read."""
    path = folder / name
    return path.stat().st_size if name.startswith(f"{SHARDED}/") else hashlib.sha256(path.read_bytes()).hexdigest()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`. A last line that a crash cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines

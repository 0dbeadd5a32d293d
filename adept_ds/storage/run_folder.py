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
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from adept_ds.config.loader import flatten
from adept_ds.config.run import RunConfig
from adept_ds.errors import UserError
from adept_ds.files import left_by_atomic_write, read_json, write_json

CONFIG_NAME = "config.json"
STATUS_NAME = "status.json"
METRICS_NAME = "metrics.jsonl"
CHECKPOINTS_NAME = "checkpoints"
CHECKPOINT_PREFIX = "step-"
CHECKPOINT_NAME = re.compile(rf"{CHECKPOINT_PREFIX}(\d{{8,}})")
"""Only folders of such names are a run's own; whatever else lies beside them is somebody's."""
LITTER = re.compile(rf"\.(best-)?{CHECKPOINT_NAME.pattern}(-again)?\.tmp|best-{CHECKPOINT_NAME.pattern}(-again)?")
"""What a killed run may leave: folders that were being filled, and results that `best` no longer leads to."""
LOCKED = (errno.EWOULDBLOCK, errno.EACCES)
"""What `flock` says where another process holds the lock; all else is about the file system."""
MANIFEST = "manifest.json"
"""In a checkpoint: each of its files with its `file_proof`."""
STATE_NAME, RNG_NAME = "state.json", "rng.safetensors"
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
    "model.keep_expanded",
    "model.name_or_path",
    "model.quantized_cache",
    "train.activation_checkpointing",
    "train.gradient_accumulation_steps",
    "train.keep_checkpoints",
    "train.micro_batch_size",
    "train.packing",
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

    def open(self, config: dict[str, Any], resume: str, warn: Callable[[str], object] = print) -> None:
        """Take the folder for a new run, or for going on with its own, and store the resolved config. It is made if it
        is not there. A try that ended before its first step has left nothing that counts as a run.

        Args:
            config: The resolved config.
            resume: `never` wants a folder without a run; anything else also takes one that holds this run, see
                `find_checkpoint`.
            warn: Called with a line where the file system has no locks.

        Raises:
            UserError: Another process holds the folder; or it holds a run and `resume` is `never`, or a run with other
                settings; or nothing can be written there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock, holder = _take_lock(self.path, warn)
            if holder:
                raise UserError(
                    f"logging.run_dir is {str(self.path)!r}, where another process is training now: {holder}"
                )
            if self.checkpoints.is_dir():
                tempfile.TemporaryFile(dir=self.checkpoints).close()
            if holds_run(self.path):
                if resume == "never":
                    raise UserError(
                        f"logging.run_dir is {str(self.path)!r}, which holds a run already: go on with it by "
                        "--resume auto, or choose another folder by --logging.run_dir"
                    )
                if (self.path / CONFIG_NAME).is_file():
                    check_same_run(self.path, config)
            write_json(self.path / CONFIG_NAME, config)
        except OSError as error:
            raise UserError(unwritable(self.path, error)) from error

    def clear_litter(self) -> None:
        """Remove what killed tries have left half-written. Not where another process may be writing it."""
        if self._lock is None:
            return
        for name in (CONFIG_NAME, STATUS_NAME, METRICS_NAME):
            for path in left_by_atomic_write(self.path / name):
                path.unlink(missing_ok=True)
        for folder in [*self.path.iterdir(), *(self.checkpoints.iterdir() if self.checkpoints.is_dir() else ())]:
            if LITTER.fullmatch(folder.name) and folder.is_dir() and folder.resolve() != self.best.resolve():
                shutil.rmtree(folder, ignore_errors=True)

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


def unwritable(path: Path, error: OSError) -> str:
    """What to tell where a run folder cannot be written to."""
    return (
        f"logging.run_dir is {str(path)!r}, where nothing can be written: {error.strerror or error} "
        f"({error.filename or path}); make room, or choose another folder by --logging.run_dir"
    )


def holds_run(run_dir: Path) -> bool:
    """Whether a folder holds anything that a run has made: metrics, a checkpoint, a result."""
    metrics = run_dir / METRICS_NAME
    has_metrics = metrics.is_file() and metrics.stat().st_size > 0
    return has_metrics or bool(list_checkpoints(run_dir / CHECKPOINTS_NAME)) or (run_dir / "best").exists()


def differing_settings(stored: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Settings, but for those of `MAY_CHANGE`, that two resolved configs have other values of, with both values."""
    before, after = flatten(_with_defaults(stored)), flatten(config)
    return [
        f"{key} was {before.get(key)!r} and is now {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE)
    ]


def lock_holder(run_dir: Path, warn: Callable[[str], object]) -> str | None:
    """Who trains in a run folder at this moment, as far as its lock says; None if nobody does.

    Args:
        run_dir: The folder, which is there.
        warn: Called with a line where the file system has no locks.
    """
    lock, holder = _take_lock(run_dir, warn)
    if lock is not None:
        lock.close()
    return holder


def _take_lock(run_dir: Path, warn: Callable[[str], object]) -> tuple[IO[str] | None, str | None]:
    """The lock's open file, held until it is closed, if there can be one, and who holds it, if another process does."""
    path = run_dir / LOCK_NAME
    lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with lock:
            if error.errno in LOCKED:
                return None, lock.read().strip() or f"it holds {path} and does not say who it is"
        warn(
            f"logging.run_dir is {str(run_dir)!r}, on a file system without locks ({error.strerror}): that no other "
            "process trains there is for you to see to"
        )
        return None, None
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
    differing = differing_settings(read_json(run_dir / CONFIG_NAME), config)
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
    """Checkpoint folders below `root`, oldest first, whether whole or damaged. Others are not looked at.

    Raises:
        UserError: The folder cannot be read.
    """
    try:
        found = [
            (int(name[1]), path)
            for path in (root.iterdir() if root.is_dir() else ())
            if (name := CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
        ]
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error.strerror}") from error
    return [path for _, path in sorted(found)]


def newest_step(run_dir: Path) -> int:
    """Step that a run would go on from by its newest whole checkpoint; 0 if it has none."""
    for folder in reversed(list_checkpoints(run_dir / CHECKPOINTS_NAME)):
        with suppress(UserError, OSError):
            checked_manifest(folder)
            return int(folder.name.removeprefix(CHECKPOINT_PREFIX))
    return 0


def checked_manifest(folder: Path) -> dict[str, str | int]:
    """Return a checkpoint's manifest: the name of each of its files, and its `file_proof`.

    Raises:
        UserError: There is none, it is damaged, or a file is not the one that was written.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{folder} is not a whole checkpoint: it has no {MANIFEST}")
    try:
        proofs: dict[str, str | int] = json.loads(manifest.read_text(encoding="utf-8"))
        damaged = [
            name for name, proof in proofs.items() if not (folder / name).is_file() or file_proof(folder, name) != proof
        ]
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{manifest} is damaged: {error}") from error
    if damaged:
        raise UserError(f"{folder} is damaged: {', '.join(damaged)} missing or changed since it was written")
    check_named(folder, proofs, STATE_NAME, RNG_NAME)
    return proofs


def check_named(folder: Path, proofs: Mapping[str, object], *names: str) -> None:
    """Raise UserError if a checkpoint's manifest does not name these files, which could then be any."""
    missing = [name for name in names if name not in proofs]
    if missing:
        raise UserError(f"{folder / MANIFEST} is damaged: it does not name {', '.join(missing)}")


def file_proof(folder: Path, name: str) -> str | int:
    """What a checkpoint's file is recognised by: its sha256, or its size for those of DeepSpeed, which hold the model
    several times over and would take minutes to read."""
    path = folder / name
    return path.stat().st_size if name.startswith(f"{SHARDED}/") else hashlib.sha256(path.read_bytes()).hexdigest()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`. Lines that are no metrics are left out: cut short by a crash, or somebody's own."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and type(line.get("step")) is int:
                lines.append(line)
    return lines

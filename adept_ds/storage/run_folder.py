"""The folder of a run: who may write to it, which config it belongs to, and how its last try ended."""

from __future__ import annotations

import errno
import fcntl
import json
import re
import shutil
import tempfile
from collections.abc import Callable
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
            lock = (self.path / ".lock").open("w")
            if self.checkpoints.is_dir():
                tempfile.TemporaryFile(dir=self.checkpoints).close()
            self._take(lock, warn)
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

    def _take(self, lock: IO[str], warn: Callable[[str], object]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LOCKED:
                raise UserError(
                    f"logging.run_dir is {str(self.path)!r}, where another process is training now"
                ) from error
            warn(
                f"logging.run_dir is {str(self.path)!r}, on a file system without locks ({error.strerror}): that no "
                "other process trains there is for you to see to"
            )
        else:
            self._lock = lock

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
    """Step that a run would go on from by its newest checkpoint; 0 if it has none."""
    folders = list_checkpoints(run_dir / CHECKPOINTS_NAME)
    return int(folders[-1].name.removeprefix(CHECKPOINT_PREFIX)) if folders else 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`. Lines that are no metrics are left out: cut short by a crash, or somebody's own."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and type(line.get("step")) is int:
                lines.append(line)
    return lines

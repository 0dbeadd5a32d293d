"""The folder of a run: who may write to it, which config it belongs to, and how its last try ended."""

from __future__ import annotations

import fcntl
import json
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
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"logging.run_dir is {str(self.path)!r}, where another process is training now") from error
        stored = self.path / CONFIG_NAME
        if stored.is_file():
            if resume == "never":
                raise UserError(
                    f"logging.run_dir is {str(self.path)!r}, which holds a run already: go on with it by "
                    "--resume auto, or choose another folder by --logging.run_dir"
                )
            check_same_run(self.path, config)
        write_json(stored, config)

    def status(self) -> dict[str, Any]:
        """How the last try ended; empty if none has."""
        return read_status(self.path)

    def set_status(self, state: str, step: int, total_steps: int, **facts: Any) -> None:
        """Write `status.json`; `state` is running, interrupted, finished, or failed."""
        write_json(self.path / STATUS_NAME, {"state": state, "step": step, "total_steps": total_steps, **facts})


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
    """Checkpoint folders below `root`, oldest first, whether whole or damaged."""
    return sorted(root.glob(f"{CHECKPOINT_PREFIX}*")) if root.is_dir() else []


def newest_step(run_dir: Path) -> int:
    """Step that a run would go on from by its newest checkpoint; 0 if it has none."""
    steps = [
        int(folder.name.removeprefix(CHECKPOINT_PREFIX)) for folder in list_checkpoints(run_dir / CHECKPOINTS_NAME)
    ]
    return max(steps, default=0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`. A last line that a crash cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines

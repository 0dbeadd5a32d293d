"""The folder of a run: who may write to it, which config it belongs to, and how its last try ended."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import IO, Any

from adept_ds.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint
from adept_ds.config_loader import flatten
from adept_ds.errors import UserError
from adept_ds.files import write_json

CONFIG_NAME = "config.json"
STATUS_NAME = "status.json"
CHECKPOINTS_NAME = "checkpoints"

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
    """A run folder held by this process. For rank 0 alone.

    Args:
        path: The folder; made if it is not there.

    Raises:
        UserError: Another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS_NAME
        path.mkdir(parents=True, exist_ok=True)
        self._lock: IO[str] = (path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"logging.run_dir is {str(path)!r}, where another process is training now") from error

    def open(self, config: dict[str, Any], resume: str, warn: Any) -> Checkpoint | None:
        """Decide where the run starts, and store its resolved config.

        Args:
            config: The resolved config.
            resume: `never` wants a folder without a run; `auto` takes the newest whole checkpoint, or the beginning if
                there is none; anything else is a checkpoint folder.
            warn: Called with a line for each damaged checkpoint that is passed over.

        Raises:
            UserError: The folder holds a run and `resume` is `never`, or a run with other settings.
        """
        stored = self.path / CONFIG_NAME
        if stored.is_file():
            if resume == "never":
                raise UserError(
                    f"logging.run_dir is {str(self.path)!r}, which holds a run already: go on with it by "
                    "--resume auto, or choose another folder by --logging.run_dir"
                )
            self._check_same_run(json.loads(stored.read_text(encoding="utf-8")), config)
        write_json(stored, config)
        if resume == "never":
            return None
        return newest_checkpoint(self.checkpoints, warn) if resume == "auto" else load_checkpoint(Path(resume))

    def _check_same_run(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        before, after = flatten(old), flatten(new)
        differing = [
            f"{key} was {before.get(key)!r} and is now {after.get(key)!r}"
            for key in sorted({*before, *after})
            if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE)
        ]
        if differing:
            raise UserError(
                f"logging.run_dir is {str(self.path)!r}, which holds a run with other settings: "
                f"{'; '.join(differing)}. Put them back, or choose another folder by --logging.run_dir"
            )

    def status(self) -> dict[str, Any]:
        """How the last try ended; empty if none has."""
        path = self.path / STATUS_NAME
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def set_status(self, state: str, step: int, total_steps: int, **facts: Any) -> None:
        """Write `status.json`; `state` is running, interrupted, finished, or failed."""
        write_json(self.path / STATUS_NAME, {"state": state, "step": step, "total_steps": total_steps, **facts})

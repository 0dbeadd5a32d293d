"""What a run makes, and the states that it goes on from.

Where the backbone is frozen that is an adapter, and whole tensors; where it is trained, a model, and each rank's part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.config.loader import config_hash
from adept_ds.config.run import RunConfig
from adept_ds.distributed import on_main_rank
from adept_ds.storage.adapter_folder import save_adapter
from adept_ds.storage.checkpoint import OPTIMIZER_NAME, Checkpoint, write_tensors
from adept_ds.storage.run_folder import SHARDED
from adept_ds.training.engine import Engine


class Result(ABC):
    """What a run makes of a model in an engine. Every method is collective."""

    def __init__(self, engine: Engine, run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine = engine
        self._run = run
        self._tokenizer = tokenizer

    def _facts(self, step: int) -> dict[str, Any]:
        return {"step": step, "config_sha256": config_hash(self._run)}

    @property
    @abstractmethod
    def zero_stage(self) -> int | None:
        """ZeRO stage by which the states are split over the ranks; None if they are whole."""

    @abstractmethod
    def write(self, folder: Path, step: int) -> None:
        """Write what evaluations take, as it is after `step` steps."""

    @abstractmethod
    def write_states(self, folder: Path, step: int) -> None:
        """Write parameters and optimizer states for exact resume."""

    @abstractmethod
    def restore(self, checkpoint: Checkpoint, dummy: dict[str, Tensor]) -> None:
        """Put parameters and optimizer states where `write_states` found them; `dummy` is a batch without labels."""


class AdapterResult(Result):
    """An adapter folder. Its states are whole tensors, for any number of ranks."""

    zero_stage = None

    @override
    def write(self, folder: Path, step: int) -> None:
        model = self.engine.model
        values = self.engine.trained_values() | model.method.constants()
        on_main_rank(
            lambda: save_adapter(folder, self._run.method, values, model.backbone_facts, self._facts(step)),
            self.engine.world,
        )

    @override
    def write_states(self, folder: Path, step: int) -> None:
        self.write(folder, step)
        states = self.engine.optimizer_states()
        on_main_rank(lambda: write_tensors(folder / OPTIMIZER_NAME, states), self.engine.world)

    @override
    def restore(self, checkpoint: Checkpoint, dummy: dict[str, Tensor]) -> None:
        # The parameters hold the checkpoint's values since the engine was built.
        self.engine.restore(checkpoint.values, checkpoint.optimizer_states, checkpoint.state.step, dummy)


class ModelResult(Result):
    """A model folder. Its states are each rank's own part of the tensors, by DeepSpeed's checkpoint."""

    @property
    @override
    def zero_stage(self) -> int:
        return self.engine.zero_stage

    @override
    def write(self, folder: Path, step: int) -> None:
        self.engine.model.save_backbone(folder, self._tokenizer, self._facts(step), self.engine.world)

    @override
    def write_states(self, folder: Path, step: int) -> None:
        self.engine.save_sharded(folder / SHARDED)

    @override
    def restore(self, checkpoint: Checkpoint, dummy: dict[str, Tensor]) -> None:
        self.engine.load_sharded(checkpoint.folder / SHARDED)


def result_of(engine: Engine, run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Result:
    """Return the result that the run's method has."""
    kind = ModelResult if run.method.saves_model else AdapterResult
    return kind(engine, run, tokenizer)

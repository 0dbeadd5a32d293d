"""ADePT in DeepSpeed's engine on the ranks of a launcher, as training sets it up."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from adept_ds.benchmark.contenders import OURS, Contender
from adept_ds.benchmark.work import Work, padded_tokens
from adept_ds.config.deepspeed import DeepSpeedPlan
from adept_ds.config.run import RunConfig
from adept_ds.distributed import World
from adept_ds.training.engine import Engine, build_engine
from adept_ds.training.optimizer import set_learning_rates


class EngineContender(Contender):
    """Takes its steps in DeepSpeed's engine, on this rank's share of the batches."""

    def __init__(self, engine: Engine, work: Work, num_virtual_tokens: int) -> None:
        super().__init__(
            name=OURS,
            model=engine.model,
            backbone=engine.model.backbone,
            optimizer=engine.optimizer,
            steps=work.steps,
            num_virtual_tokens=num_virtual_tokens,
            padded_tokens=padded_tokens(work.steps, num_virtual_tokens, work.encoder_decoder),
        )
        self._engine, self._labels = engine, work.labels_of_step

    def forward_backward(self, number: int) -> Tensor:
        """See `Contender.forward_backward`; the loss is this rank's sum."""
        return self._engine.forward_backward(self.steps[number], self._labels[number])

    def update(self) -> None:
        """See `Contender.update`."""
        self._engine.step()

    @property
    def coordinator(self) -> Any:
        """See `Contender.coordinator`."""
        offload = getattr(self._engine.deepspeed.optimizer, "parameter_offload", None)
        return offload and offload.get_param_coordinator()


def engine_contender(
    run: RunConfig, architecture: PreTrainedConfig, work: Work, plan: DeepSpeedPlan, random_init: bool, world: World
) -> Contender:
    """Build the engine that training would have. Collective.

    Raises:
        UserError: As `build_engine`.
    """
    random_shape = architecture if random_init else None
    engine = build_engine(run, plan.config, work.tokenizer, world, random_shape=random_shape)
    set_learning_rates(engine.optimizer, 1.0)
    engine.model.train()
    return EngineContender(engine, work, run.method.num_virtual_tokens)

"""ADePT in DeepSpeed's engine on the ranks of a launcher, as training sets it up."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from typing_extensions import override

from adept_ds.benchmark.contenders import OURS, Contender
from adept_ds.benchmark.work import Work, padded_tokens
from adept_ds.config.deepspeed import SHARDED_STAGE, DeepSpeedPlan
from adept_ds.config.run import RunConfig
from adept_ds.distributed import World
from adept_ds.training.engine import Engine, build_engine


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

    @override
    def forward_backward(self, number: int) -> Tensor:
        """The loss is this rank's sum."""
        return self._engine.forward_backward(self.steps[number], self._labels[number])

    @override
    def update(self) -> None:
        self._engine.step()

    @property
    @override
    def coordinator(self) -> Any:
        if self._engine.zero_stage != SHARDED_STAGE:
            return None
        return self._engine.deepspeed.optimizer.parameter_offload.get_param_coordinator()


def engine_contender(
    run: RunConfig, architecture: PreTrainedConfig, work: Work, plan: DeepSpeedPlan, random_init: bool, world: World
) -> Contender:
    """Build the engine that training would have. Collective.

    Raises:
        UserError: As `build_engine`.
    """
    random_shape = architecture if random_init else None
    engine = build_engine(run, plan.config, work.tokenizer, world, random_shape=random_shape)
    engine.model.train()
    return EngineContender(engine, work, run.method.num_virtual_tokens)

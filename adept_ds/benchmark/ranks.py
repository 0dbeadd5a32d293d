"""ADePT in DeepSpeed's engine on the ranks of a launcher, as `adept_ds.training.recipe` sets it up."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from adept_ds.backbone.load import load_backbone, random_backbone
from adept_ds.benchmark.contenders import OURS, Contender
from adept_ds.benchmark.work import Work, padded_tokens
from adept_ds.config.deepspeed import SHARDED_STAGE, DeepSpeedPlan
from adept_ds.config.run import RunConfig
from adept_ds.distributed import World
from adept_ds.model.adapted_model import get_adept_model
from adept_ds.training.engine import Engine, prepare_deepspeed, shard_options
from adept_ds.training.optimizer import build_optimizer, set_learning_rates


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
        if self._engine.zero_stage != SHARDED_STAGE:
            return None
        return self._engine.deepspeed.optimizer.parameter_offload.get_param_coordinator()


def engine_contender(
    run: RunConfig, architecture: PreTrainedConfig, work: Work, plan: DeepSpeedPlan, random_init: bool, world: World
) -> Contender:
    """Load the backbone, split over the ranks at ZeRO stage 3, and put ADePT and DeepSpeed around it. Collective.

    Raises:
        UserError: As `load_backbone`.
    """
    prepare_deepspeed(world)
    shards = shard_options(plan.config, run.train.sharding, world)
    if random_init:
        backbone = random_backbone(run.model, architecture, world.device, **shards)
    else:
        backbone = load_backbone(run.model, world.device, show_progress=world.is_main, **shards)
    model = get_adept_model(backbone, run.method, work.tokenizer, run.train.seed)
    if run.train.activation_checkpointing:
        model.checkpoint_activations()
    engine = Engine(model, build_optimizer(model, run.train), plan.config, world)
    set_learning_rates(engine.optimizer, 1.0)
    model.train()
    return EngineContender(engine, work, run.method.num_virtual_tokens)

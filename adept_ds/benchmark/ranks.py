"""ADePT in DeepSpeed's engine on the ranks of a launcher, as training sets it up, and what is beside it there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from typing_extensions import override

from adept_ds.backbone.load import load_backbone, random_backbone
from adept_ds.benchmark.contenders import AGAINST_ON_RANKS, BY_WEIGHT, OURS, PLAIN, Contender
from adept_ds.benchmark.work import Work, padded_tokens
from adept_ds.config.deepspeed import SHARDED_STAGE, DeepSpeedPlan
from adept_ds.config.run import RunConfig
from adept_ds.distributed import World
from adept_ds.model.adapted_model import get_adept_model
from adept_ds.training.engine import Engine, build_engine
from adept_ds.training.optimizer import build_optimizer


class EngineContender(Contender):
    """Takes its steps in DeepSpeed's engine, on this rank's share of the batches."""

    def __init__(self, name: str, engine: Engine, work: Work, num_virtual_tokens: int) -> None:
        super().__init__(
            name=name,
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
    def fetches(self) -> list[tuple[Any, str]]:
        if self._engine.zero_stage != SHARDED_STAGE:
            return []
        coordinator = self._engine.deepspeed.optimizer.parameter_offload.get_param_coordinator()
        layers = [(self._engine.layers, "enter")] if self._engine.layers else []
        return [(coordinator, "fetch_sub_module"), *layers]


def rank_contenders(
    run: RunConfig,
    architecture: PreTrainedConfig,
    work: Work,
    plan: DeepSpeedPlan,
    against: Sequence[str],
    random_init: bool,
    world: World,
    say: Callable[[str], None],
) -> list[Contender]:
    """Build the engine that training would have, and the chosen others. Collective.

    Args:
        run: The run.
        architecture: The backbone's shape.
        work: The common batches, this rank's share.
        plan: What DeepSpeed is handed.
        against: Keys of `AGAINST_ON_RANKS`; others are none of these.
        random_init: Take random weights in place of a checkpoint's.
        world: This rank.
        say: As `build_engine`.

    Raises:
        UserError: As `build_engine`.
    """
    random_shape = architecture if random_init else None

    def in_engine(name: str, run: RunConfig) -> Contender:
        engine = build_engine(run, plan.config, work.tokenizer, world, random_shape=random_shape, say=say)
        engine.model.train()
        return EngineContender(name, engine, work, run.method.num_virtual_tokens)

    contenders = [in_engine(OURS, run)]
    names = {AGAINST_ON_RANKS[choice] for choice in against if choice in AGAINST_ON_RANKS}
    if BY_WEIGHT in names:
        by_weight = run.model_copy(update={"train": run.train.model_copy(update={"gather": "weight"})})
        contenders.append(in_engine(BY_WEIGHT, by_weight))
    if PLAIN in names:
        contenders.append(_plain(run, architecture, work, random_init, world))
    return contenders


def _plain(run: RunConfig, architecture: PreTrainedConfig, work: Work, random_init: bool, world: World) -> Contender:
    device, length = world.device, run.method.num_virtual_tokens
    backbone = random_backbone(run.model, architecture, device) if random_init else load_backbone(run.model, device)
    model = get_adept_model(backbone, run.method, work.tokenizer, run.train.seed)
    if run.train.activation_checkpointing:
        model.checkpoint_activations()
    return Contender(
        name=PLAIN,
        model=model.train(),
        backbone=backbone,
        optimizer=build_optimizer(model, run.train),
        steps=[[{name: tensor.to(device) for name, tensor in batch.items()} for batch in step] for step in work.steps],
        num_virtual_tokens=length,
        padded_tokens=padded_tokens(work.steps, length, work.encoder_decoder),
    )

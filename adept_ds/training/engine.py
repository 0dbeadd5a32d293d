"""The DeepSpeed engine around an adapted model: the only file with DeepSpeed's training interface.

Everything that depends on how DeepSpeed holds parameters and optimizer states is here, so the loop and the checkpoints
deal in whole fp32 tensors by name at every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_grad,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from adept_ds.backbone.layer_gathers import LayerGathers, frozen_layers, modules_by_layer
from adept_ds.backbone.load import load_backbone, random_backbone
from adept_ds.backbone.sharding import full_shape, is_sharded, node_group, own_numel
from adept_ds.config.deepspeed import SHARDED_STAGE, gathers_layers
from adept_ds.config.run import RunConfig
from adept_ds.contexts import attribute_set
from adept_ds.distributed import World, prepare_deepspeed, ranks_by_node, sum_over_ranks
from adept_ds.errors import UserError
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.rank_environment import is_main_rank
from adept_ds.training.optimizer import build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's states of a parameter, beside its step count."""
LOSS_SCALER = "loss_scaler"
"""Name among the optimizer's states under which fp16 keeps AdamW's own count of steps and the fields below."""
_TAG = "states"
"""DeepSpeed's name for the one checkpoint in a folder."""
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _load_tensors(path: str, map_location: Any = None) -> Any:
    """Read one of DeepSpeed's files as DeepSpeed does, but without running code that a pickle may hold."""
    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, weights_only=True)


def check_offload(config: dict[str, Any]) -> None:
    """Refuse offloading to a disk where DeepSpeed cannot do it.

    Raises:
        UserError: Its asynchronous reading and writing cannot be built here.
    """
    for name in ("offload_param", "offload_optimizer"):
        device = config["zero_optimization"].get(name, {}).get("device")
        if device != "nvme":
            continue
        if not deepspeed.ops.__compatible_ops__["async_io"]:
            raise UserError(
                f"deepspeed.zero_optimization.{name}.device is 'nvme', for which DeepSpeed builds its async_io "
                "extension; that needs a C++ compiler and libaio with its headers (Debian's libaio-dev), which are not "
                "here; expected 'cpu', or install them"
            )
        if is_main_rank():
            print(f"deepspeed.zero_optimization.{name}: DeepSpeed builds async_io now, unless it has; it takes minutes")


class Engine:
    """A model, its optimizer and DeepSpeed's engine over both. Every method is collective.

    Args:
        model: The adapted model, its backbone sharded already at ZeRO stage 3.
        optimizer: AdamW over the model's trained parameters.
        config: The completed `deepspeed` section.
        world: This rank.
        by_layer: Whether frozen weights are gathered a layer at a time, not by DeepSpeed.
        label_smoothing: Of the loss that is trained on, as `AdaptedModel.forward`.
    """

    def __init__(
        self,
        model: AdaptedModel,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        world: World,
        by_layer: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        self.model = model
        self.label_smoothing = label_smoothing
        self.world = world
        dtype = model.backbone.get_output_embeddings().weight.dtype
        for parameter in model.trainable_parameters().values():
            # DeepSpeed partitions parameters of one precision; it keeps the fp32 master values itself.
            parameter.data = parameter.data.to(dtype)
        # Its states are keyed by the tensors that DeepSpeed steps: the parameters without ZeRO, its own shards with it.
        self.optimizer = optimizer
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.zero_stage = int(self.deepspeed.zero_optimization_stage())
        self.layers = self._take_layers() if by_layer else None
        """What gathers the layers' frozen weights; None if DeepSpeed does, or they are whole."""

    def _take_layers(self) -> LayerGathers:
        """Take the frozen weights of all layers out of DeepSpeed's hands, and its hooks off the modules that have no
        others."""
        layers = frozen_layers(self.model, self.model.backbone)
        taken = {parameter for own in layers.values() for parameter in own}
        offload = self.deepspeed.optimizer.parameter_offload
        registries = {
            id(hooks)
            for module in modules_by_layer(layers)
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
        }
        for handle in [*offload.forward_hooks, *offload.backward_hooks]:
            if id(handle.hooks_dict_ref()) in registries:
                handle.remove()
        # Small ones, which DeepSpeed would split and gather again with each step of the optimizer.
        offload.persistent_parameters[:] = [one for one in offload.persistent_parameters if one not in taken]
        for parameter in taken:
            parameter.ds_persist = False  # type: ignore[attr-defined]
        return LayerGathers(layers, self.world.device)

    def forward_backward(self, micro_batches: list[dict[str, Tensor]], label_tokens: float) -> Tensor:
        """Accumulate gradients over this rank's micro-batches of one step; return their summed loss.

        The gradients are those of the loss summed over all ranks' micro-batches, divided by `label_tokens`. DeepSpeed
        averages over ranks, which the factor `world_size` undoes. `step` completes the step; a caller that does not
        call it leaves the parameters as they were.
        """
        scale = self.world.world_size / label_tokens
        total = torch.zeros((), device=self.world.device)
        for index, batch in enumerate(micro_batches):
            if index:
                self.deepspeed.step()  # Below the accumulation boundary this only counts.
            # Of packed rows a step has as many micro-batches as its examples fill.
            self.deepspeed.set_gradient_accumulation_boundary(index + 1 == len(micro_batches))
            loss = self.deepspeed(**self._on_device(batch), reduction="sum", label_smoothing=self.label_smoothing).loss
            self.deepspeed.backward(loss * scale, scale_wrt_gas=False)
            if self.layers is not None:
                self.layers.drop()
            total += loss.detach()
        return total

    def step(self) -> None:
        """Update the trained parameters with the gradients of `forward_backward`."""
        for parameter in filter(is_sharded, self.model.trainable_parameters().values()):
            # The norm, by which gradients are clipped, and fp16's search for overflows take all of a rank's part.
            if 0 < (numel := own_numel(parameter)) < parameter.ds_tensor.numel():  # type: ignore[attr-defined]
                gradient = safe_get_local_grad(parameter).clone()
                gradient[numel:] = 0
                safe_set_local_grad(parameter, gradient)
        self.deepspeed.step()

    @torch.no_grad()
    def evaluation_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Summed cross-entropy of one batch, which no label smoothing is in."""
        return self.deepspeed(**self._on_device(batch), reduction="sum").loss

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in batch.items()}

    def gradient_norm(self) -> float | None:
        """Norm of the whole gradient of the last step, before clipping; None where DeepSpeed does not compute it."""
        norm = self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def broken_parameters(self) -> list[str]:
        """Names of the trained parameters that have NaN or infinity in them, on any rank."""
        parameters = self.model.trainable_parameters()
        own = [
            parameter.ds_tensor.flatten()[: own_numel(parameter)] if is_sharded(parameter) else parameter  # type: ignore[attr-defined]
            for parameter in parameters.values()
        ]
        broken = sum_over_ranks([float(not torch.isfinite(tensor).all()) for tensor in own], self.world)
        return [name for name, ranks in zip(parameters, broken, strict=True) if ranks]

    def trained_values(self) -> dict[str, Tensor]:
        """The fp32 master value of each trained parameter, whole, on the CPU."""
        return {
            name: self._master(parameter).to("cpu", copy=True)
            for name, parameter in self.model.trainable_parameters().items()
        }

    def optimizer_states(self) -> dict[str, Tensor]:
        """AdamW's moments of each trained parameter, whole, as `{name}.{moment}` on the CPU.

        In fp16 also the state of the loss scaling, which skips the steps whose gradients overflow.
        """
        if self._has_moments:
            self._link_moments()
        states = {
            f"{name}.{moment}": self._moment(parameter, moment).to("cpu", copy=True)
            for name, parameter in self.model.trainable_parameters().items()
            for moment in MOMENTS
        }
        if self._scaler is not None:
            steps = [float(state["step"]) for state in self.optimizer.state.values() if "step" in state]
            fields = [float(getattr(self._scaler, field)) for field in _SCALER_FIELDS]
            states[LOSS_SCALER] = torch.tensor([max(steps, default=0.0), *fields], dtype=torch.float64)
        return states

    def restore(
        self, values: Mapping[str, Tensor], states: Mapping[str, Tensor], steps: int, dummy: dict[str, Tensor]
    ) -> None:
        """Put masters and moments where they were after `steps` steps; the parameters hold `values` already.

        DeepSpeed allocates moments in the first step, sharded in its own way. So one step is taken here at a learning
        rate of zero on `dummy`, a batch without labels, which changes no parameter.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.forward_backward([dummy], label_tokens=1)
        self.step()
        self._link_moments()
        if self._scaler is not None:
            adam_steps, *fields = states[LOSS_SCALER].tolist()
            steps = int(adam_steps)
            for field, value in zip(_SCALER_FIELDS, fields, strict=True):
                setattr(self._scaler, field, value if field == "cur_scale" else int(value))
        for name, parameter in self.model.trainable_parameters().items():
            self._set_master(parameter, values[name].to(self.world.device))
            for moment in MOMENTS:
                self._set_moment(parameter, moment, states[f"{name}.{moment}"].to(self.world.device))
        for state in self.optimizer.state.values():
            state["step"].fill_(steps)

    def save_sharded(self, folder: Path) -> None:
        """Write each rank's own part of parameters, masters and optimizer states, by DeepSpeed's checkpoint."""
        self.deepspeed.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load_sharded(self, folder: Path) -> None:
        """Read what `save_sharded` wrote, on as many ranks at the same ZeRO stage."""
        with attribute_set(self.deepspeed.checkpoint_engine, "load", _load_tensors):
            self.deepspeed.load_checkpoint(str(folder), tag=_TAG)

    @property
    def _scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler; None where the loss is not scaled."""
        if not self.deepspeed.fp16_enabled():
            return None
        # Not by getattr: a checkpoint without the scaler's state would be resumed with other losses.
        scaler = self.deepspeed.optimizer.loss_scaler
        return scaler if scaler.dynamic else None

    @property
    def _has_moments(self) -> bool:
        """Whether AdamW has taken a step; in fp16 the first ones may all have overflowed and been skipped."""
        return self._scaler is None or any(MOMENTS[0] in state for state in self.optimizer.state.values())

    def _link_moments(self) -> None:
        """Make the moments of all groups reachable from their parameters.

        At stages 1 and 2 DeepSpeed links them once, when the first group has taken its first step and the others have
        no moments yet.
        """
        if self.zero_stage not in (1, 2):
            return
        optimizer = self.deepspeed.optimizer
        if not hasattr(optimizer, "_hp_optimizer_states_linked"):
            # Setting it anew would do nothing, and moments would be missing from every checkpoint.
            raise RuntimeError(f"{type(optimizer).__name__} of this version of DeepSpeed links moments in another way")
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()

    def _master(self, parameter: torch.nn.Parameter) -> Tensor:
        # Without ZeRO and in fp32 the parameter is its own master.
        master = safe_get_full_fp32_param(parameter)
        return (parameter.detach() if master is None else master).float().view(full_shape(parameter))

    def _set_master(self, parameter: torch.nn.Parameter, value: Tensor) -> None:
        if is_sharded(parameter):
            safe_set_local_fp32_param(parameter, self._own_part(parameter, value))
        else:
            safe_set_full_fp32_param(parameter, value)

    def _set_moment(self, parameter: torch.nn.Parameter, moment: str, value: Tensor) -> None:
        if parameter in self.optimizer.state:
            self.optimizer.state[parameter][moment].copy_(value)
        elif is_sharded(parameter):
            safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), moment)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def _own_part(self, parameter: torch.nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of a value, padded as DeepSpeed pads it; its own setters fail where that is needed."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = F.pad(value.flatten(), (0, size * self.world.world_size - value.numel()))
        return padded[self.world.rank * size : (self.world.rank + 1) * size]

    def _moment(self, parameter: torch.nn.Parameter, moment: str) -> Tensor:
        if not self._has_moments:
            return torch.zeros(full_shape(parameter))
        if parameter in self.optimizer.state:
            return self.optimizer.state[parameter][moment]
        state = safe_get_full_optimizer_state(parameter, moment)
        return state.float().view(full_shape(parameter))


def build_engine(
    run: RunConfig,
    config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    world: World,
    values: dict[str, Tensor] | None = None,
    random_shape: PreTrainedConfig | None = None,
    say: Callable[[str], None] = print,
) -> Engine:
    """Load the backbone, split over the ranks as it is read, and put the method and DeepSpeed around it. Collective.

    Args:
        run: The run, with `train.sharding` decided.
        config: The completed `deepspeed` section.
        tokenizer: As `AdaptedModel`.
        world: This rank.
        values: Trained values to go on from, if any.
        random_shape: Make a backbone of this shape with random weights in place of loading one.
        say: Is told on rank 0 what `train.compile` does.

    Raises:
        UserError: As `check_offload`, `load_backbone` and `get_adept_model`.
    """
    prepare_deepspeed(world)
    check_offload(config)
    shards: dict[str, Any] = {
        "deepspeed_config": config if config["zero_optimization"]["stage"] == SHARDED_STAGE else None,
        "shard_group": node_group(ranks_by_node(world)) if run.train.sharding == "node" else None,
    }
    if random_shape is not None:
        backbone = random_backbone(run.model, random_shape, world.device, **shards)
    else:
        backbone = load_backbone(run.model, world.device, show_progress=world.is_main, **shards)
    model = get_adept_model(backbone, run.method, tokenizer, run.train.seed)
    if run.train.activation_checkpointing:
        model.checkpoint_activations()
    if run.train.compile:
        model.compile_blocks(say=say if world.is_main else None)
    if values:
        model.load_trained(values)
    optimizer, by_layer = build_optimizer(model, run.train), gathers_layers(run, config)
    return Engine(model, optimizer, config, world, by_layer, run.train.label_smoothing)

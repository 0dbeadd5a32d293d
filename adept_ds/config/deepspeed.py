"""The `deepspeed` section: what may be in it, and what is filled in.

DeepSpeed ignores a misspelt top-level key (`zero_optimisation` gives stage 0), reads "auto" as its own default, and
has defaults of its own for clipping and precision. So here the keys are checked, every value has one owner (batch
sizes and clipping belong to `train`, precision to `model`), and nothing is left to a default that matters.

DeepSpeed itself is not imported: this also serves where it is not installed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_ds.config.batch import BatchArithmetic, batch_arithmetic
from adept_ds.config.run import RunConfig
from adept_ds.errors import UserError, did_you_mean

AUTO = "auto"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP_LEVEL_KEYS = _names("""
    activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
    managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel tensorboard
    timers torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
    vocabulary_size wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization
""")
"""What DeepSpeed 0.19 reads at the top level."""

_FLAGS = _names("""
    dataloader_drop_last disable_allgather disable_python_gc dump_state memory_breakdown prescale_gradients
    use_data_before_expert_parallelism wall_clock_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    activation_checkpointing.contiguous_memory_optimization activation_checkpointing.cpu_checkpointing
    activation_checkpointing.partition_activations activation_checkpointing.profile
    activation_checkpointing.synchronize_checkpoint_boundary aio.overlap_events aio.single_submit aio.use_gds
    data_efficiency.enabled flops_profiler.enabled
""")
_COUNTS = _names("""
    steps_per_print vocabulary_size aio.block_size aio.intra_op_parallelism aio.queue_depth
    fp16.initial_scale_power fp16.loss_scale_window zero_optimization.sub_group_size
""")
_OBJECTS = _names("""
    activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger compile csv_monitor data_efficiency
    data_types datastates_ckpt flops_profiler fp16 hybrid_engine tensorboard timers torch_autocast wandb
    weight_quantization zero_optimization
""")
_DTYPES = _names("communication_data_type seq_parallel_communication_data_type data_types.grad_accum_dtype")
_KINDS: dict[str, tuple[frozenset[str], Callable[[Any], bool]]] = {
    "true or false": (_FLAGS, lambda value: isinstance(value, bool)),
    "a whole number of 1 or more": (_COUNTS, lambda value: type(value) is int and value > 0),
    "an object": (_OBJECTS, lambda value: isinstance(value, dict)),
    "fp32, fp16 or bf16": (_DTYPES, lambda value: value in ("fp32", "fp16", "bf16")),
    "a number above 0": (
        _names("gradient_predivide_factor"),
        lambda value: type(value) in (int, float) and 0 < value < math.inf,
    ),
    "debug, info, warning, error or critical": (
        _names("log_level"),
        lambda value: value in ("debug", "info", "warning", "error", "critical"),
    ),
}
"""What is expected to the keys that expect it, where DeepSpeed takes anything and fails, or does something else, once
the model is loaded."""

_ZERO_STAGE3_KEYS = _names("""
    prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters
    max_reuse_distance gather_16bit_weights_on_model_save module_granularity_threshold
    use_all_reduce_for_fetch_params allgather_sequential
""")

SECTION_KEYS = {
    "zero_optimization": _names("""
    stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
    allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
    elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size cpu_offload_param
    cpu_offload_use_pin_memory cpu_offload stage3_gather_fp16_weights_on_model_save ignore_unused_parameters
    legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights
    zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
    pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
    save_muon_momentum_buffer_in_memory leaf_module
""")
    | {prefix + name for name in _ZERO_STAGE3_KEYS for prefix in ("", "stage3_")},
    "bf16": _names(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    "fp16": _names("""
    enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
    min_loss_scale fp16_master_weights_and_grads
"""),
    "data_types": _names("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
}
"""What DeepSpeed 0.19 reads in the sections that matter most here. A pair of names is an alias of one setting."""

OFFLOAD_KEYS = {
    "offload_param": _names("device nvme_path buffer_count buffer_size max_in_cpu pin_memory"),
    "offload_optimizer": _names("""
    device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload
    cpuadam_cores_perc
"""),
}
"""What DeepSpeed 0.19 reads in the two offload sections of `zero_optimization`."""
_OFFLOAD_DEVICES = frozenset(("none", "cpu", "nvme"))

_ONE_DATA_PARALLEL_GROUP = "the batch arithmetic counts every rank as a data-parallel one"
REFUSED_KEYS = {
    "optimizer": "two learning rates need two parameter groups, which DeepSpeed's section cannot express; set "
    "train.learning_rate, train.adam_betas, train.adam_eps and train.weight_decay",
    "scheduler": "the schedule drives two learning rates; set train.schedule and train.warmup_steps",
    "gradient_allreduce_op": "the loss is normalised over all ranks for gradients that are averaged",
    "managed_gradient_accumulation": "gradient accumulation belongs to train.gradient_accumulation_steps",
    "tensor_parallel": _ONE_DATA_PARALLEL_GROUP,
    "sequence_parallel_size": _ONE_DATA_PARALLEL_GROUP,
    "expert_parallel": _ONE_DATA_PARALLEL_GROUP,
    "pipeline": _ONE_DATA_PARALLEL_GROUP,
}
"""Keys that DeepSpeed knows and a run may not set, with the reason."""

OWNERS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "bf16.enabled": "model.dtype",
    "fp16.enabled": "model.dtype",
    "zero_optimization.stage": "train.sharding",
    "torch_autocast.enabled": "model.dtype",
    "bf16.bf16_master_weights_and_grads": "model.dtype",
    "bf16.bf16_optimizer_states": "model.dtype",
}
"""Key of the `deepspeed` section to the setting that its value follows from. Absent, "auto" or equal is right."""

HIDDEN_SIZE_KEYS = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
"""Keys of `zero_optimization` where "auto" follows from the backbone's hidden size."""

STEPS_PER_PRINT = 1_000_000_000
"""DeepSpeed's own progress line is off; the loop logs."""


@dataclass(frozen=True)
class DeepSpeedPlan:
    """What a run hands to DeepSpeed."""

    config: dict[str, Any]
    """For `deepspeed.initialize`, with every value that matters written out."""
    batch: BatchArithmetic
    derived: dict[str, str]
    """Dotted key in `config` to the setting or rule that it follows from."""


ADAPTER_BUCKET_ELEMENTS = 1_000_000
"""`reduce_bucket_size` where an adapter is trained and the section names none."""
SHARDED_STAGE = 3
"""ZeRO stage that splits the weights."""
_OWN_FORMS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
"""Keys of `zero_optimization` by which DeepSpeed keeps more of a weight than its part."""
DEFAULT_STAGE = 1
"""ZeRO stage where the section names none: whole weights on every rank, as at 0, and fp32 masters for bf16 too."""


def complete(run: RunConfig, world_size: int, hidden_size: int | None = None) -> DeepSpeedPlan:
    """Return the section with everything filled in that follows from the run.

    Args:
        run: A run whose section has passed `section_problems`.
        world_size: Number of ranks.
        hidden_size: Width d of the backbone; needed only where `zero_optimization` has "auto". Then reduce_bucket_size
            is d^2, stage3_prefetch_bucket_size 0.9 d^2, stage3_param_persistence_threshold 10 d, as in `transformers`.

    Raises:
        UserError: The batch does not divide, or a value contradicts the setting that owns it.
    """
    batch = batch_arithmetic(run.train, world_size)
    problems = [f"deepspeed.{key}: {message}" for key, message in _contradictions(run, batch)]
    if problems:
        raise UserError("\n".join(problems))
    if run.train.sharding == "auto":
        raise ValueError("train.sharding: auto has to be decided first")
    config = copy.deepcopy(run.deepspeed)
    derived: dict[str, str] = {}
    for key, value in _owned_values(run, batch).items():
        _put(config, key, value)
        derived[key] = _owner(run, key)

    zero = config.setdefault("zero_optimization", {"stage": DEFAULT_STAGE})
    zero.setdefault("stage", DEFAULT_STAGE)
    for key in HIDDEN_SIZE_KEYS:
        if zero.get(key) == AUTO:
            if hidden_size is None:
                raise UserError(f'deepspeed.zero_optimization.{key} = "auto" needs the hidden size; expected a number')
            sizes = (hidden_size**2, int(0.9 * hidden_size**2), 10 * hidden_size)
            zero[key] = sizes[HIDDEN_SIZE_KEYS.index(key)]
            derived[f"zero_optimization.{key}"] = f"hidden size {hidden_size}"

    if not run.method.saves_model:
        # DeepSpeed allocates the whole bucket, 2 GB by its default, for gradients of some hundred kilobytes.
        zero.setdefault("reduce_bucket_size", ADAPTER_BUCKET_ELEMENTS)
    if zero.get("offload_param", {}).get("device") == "nvme":
        # A weight that is kept for a later use keeps its buffer too, and DeepSpeed fails once there is none left. It
        # also fails where it reads ahead and meets a weight that is used twice, as in the forward and backward passes.
        zero.setdefault("stage3_max_reuse_distance", 0)
        zero.setdefault("stage3_prefetch_bucket_size", 0)
    config.setdefault("steps_per_print", STEPS_PER_PRINT)
    # The optimizer is torch's own AdamW, also where its states are offloaded to the CPU.
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    # An adapter's gradients are a few tens of kilobytes. Where the backbone is trained, fp32 doubles their traffic and
    # is right all the same: a sum over many ranks in bf16 loses every gradient below 1/256 of it.
    config.setdefault("communication_data_type", "fp32")
    if zero.get("stage", 0) > 0:
        # Without ZeRO, DeepSpeed cannot accumulate in another precision than the model's.
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return DeepSpeedPlan(config, batch, derived)


def gathers_layers(run: RunConfig, config: dict[str, Any]) -> bool:
    """Whether frozen weights are gathered a layer at a time, by `train.gather`, where they are split at all.

    DeepSpeed gathers them where it reads them from a disk, or holds them in a form of its own.

    Args:
        run: The run.
        config: Its completed section.
    """
    zero = config["zero_optimization"]
    on_disk = zero.get("offload_param", {}).get("device") == "nvme"
    has_own_form = any(zero.get(name) for name in _OWN_FORMS) or zero.get("zero_hpz_partition_size", 1) > 1
    return run.train.gather == "layer" and zero["stage"] == SHARDED_STAGE and not on_disk and not has_own_form


def section_problems(section: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, message) for what is wrong in the section whatever the rest of the run says."""
    for name, value in section.items():
        key = f"deepspeed.{name}"
        if name in REFUSED_KEYS:
            yield key, f"not allowed here: {REFUSED_KEYS[name]}"
        elif name not in TOP_LEVEL_KEYS:
            yield key, f"DeepSpeed has no such key{_nearest(name, TOP_LEVEL_KEYS)}"
        elif name in SECTION_KEYS and isinstance(value, dict):
            for inner in value.keys() - SECTION_KEYS[name]:
                yield f"{key}.{inner}", f"DeepSpeed has no such key in {name}{_nearest(inner, SECTION_KEYS[name])}"
    for expected, (keys, is_one) in _KINDS.items():
        for key in sorted(keys):
            value = _lookup(section, key)
            if value is not _ABSENT and value != AUTO and not is_one(value):
                yield f"deepspeed.{key}", f"expected {expected}"
    zero = section.get("zero_optimization")
    if isinstance(zero, dict):
        if not _is_stage(zero.get("stage", 0)):
            yield "deepspeed.zero_optimization.stage", "expected 0, 1, 2 or 3"
        for name, keys in OFFLOAD_KEYS.items():
            if name in zero:
                yield from _offload_problems(f"deepspeed.zero_optimization.{name}", zero[name], keys)
    may_be_auto = {*OWNERS, *(f"zero_optimization.{name}" for name in HIDDEN_SIZE_KEYS)}
    for inner in _auto_keys(section):
        if inner not in may_be_auto and inner != "data_types.keep_in_fp32_modules":
            yield f"deepspeed.{inner}", 'nothing fills in this "auto"; expected a value, or leave the key out'


def _offload_problems(key: str, offload: Any, keys: frozenset[str]) -> Iterator[tuple[str, str]]:
    if not isinstance(offload, dict):
        yield key, "expected an object"
        return
    for name in offload.keys() - keys:
        yield f"{key}.{name}", f"DeepSpeed has no such key there{_nearest(name, keys)}"
    device = offload.get("device", "none")
    if not isinstance(device, str) or device not in _OFFLOAD_DEVICES:
        yield f"{key}.device", f"{shown(device)} is no device for it{_nearest(str(device), _OFFLOAD_DEVICES)}"
    if device == "nvme" and not Path(str(offload.get("nvme_path", ""))).is_dir():
        yield f"{key}.nvme_path", "device nvme needs the folder of a local disk; expected one that exists"


def contradictions(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, message) for values that contradict their owner at any world size."""
    for key, message in _contradictions(run, None):
        yield f"deepspeed.{key}", message


def _owned_values(run: RunConfig, batch: BatchArithmetic | None) -> dict[str, Any]:
    """Key of the section to the value that its owner gives it; without `batch`, those that need no world size."""
    values: dict[str, Any] = {
        "gradient_clipping": run.train.max_grad_norm,
        "bf16.enabled": run.model.dtype == "bf16",
        "fp16.enabled": run.model.dtype == "fp16",
        "torch_autocast.enabled": False,
        "bf16.bf16_master_weights_and_grads": False,
        "bf16.bf16_optimizer_states": False,
    }
    if run.train.sharding in ("node", "global"):
        values["zero_optimization.stage"] = SHARDED_STAGE
    if run.train.packing is None:
        values["train_batch_size"] = run.train.global_batch_size
    elif batch is not None:
        # Of rows: DeepSpeed insists that the three sizes go together, and does nothing with them.
        values["train_batch_size"] = batch.micro_batch_size * batch.gradient_accumulation_steps * batch.world_size
    if batch is not None:
        values["train_micro_batch_size_per_gpu"] = batch.micro_batch_size
        values["gradient_accumulation_steps"] = batch.gradient_accumulation_steps
    return values


def _contradictions(run: RunConfig, batch: BatchArithmetic | None) -> Iterator[tuple[str, str]]:
    zero = run.deepspeed.get("zero_optimization", {})
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if run.model.dtype != "fp32" and stage == 0:
        yield (
            "zero_optimization.stage",
            (
                f"stage 0 with model.dtype {run.model.dtype} accumulates gradients in it and keeps no fp32 states "
                "that could be saved; expected 1 (the same traffic, whole weights on every rank), 2 or 3, or "
                "model.dtype fp32"
            ),
        )
    offloads = _lookup(run.deepspeed, "zero_optimization.offload_param.device") not in (_ABSENT, "none")
    if offloads and (stage or DEFAULT_STAGE) != SHARDED_STAGE and run.train.sharding not in ("node", "global"):
        yield "zero_optimization.offload_param", "only weights that are split can be offloaded; expected stage 3"
    if run.train.sharding == "replicate" and stage == 3:
        yield (
            "zero_optimization.stage",
            "3 splits the weights, which contradicts train.sharding = 'replicate'; expected 1, 2 or no value here",
        )
    if run.train.sharding == "auto" and stage is not None:
        yield "zero_optimization.stage", f"{stage} contradicts train.sharding = 'auto', which chooses it; leave one out"
    for key, expected in _owned_values(run, batch).items():
        value = _lookup(run.deepspeed, key)
        # `True == 1` in Python, and 1 is not a valid flag.
        if value not in (_ABSENT, AUTO) and (
            value != expected or isinstance(value, bool) != isinstance(expected, bool)
        ):
            owner = _owner(run, key)
            section, _, name = owner.partition(".")
            owned = getattr(getattr(run, section), name)
            yield (
                key,
                (
                    f"{shown(value)} contradicts {owner} = {owned!r}, which sets it to {expected!r}; "
                    f'expected "auto" or no value here'
                ),
            )


def _owner(run: RunConfig, key: str) -> str:
    """The setting that the value of a key follows from; see `OWNERS`."""
    is_packed = run.train.packing is not None and key in ("train_batch_size", "gradient_accumulation_steps")
    return "train.packing" if is_packed else OWNERS[key]


_ABSENT: Any = object()


def _lookup(values: Any, key: str) -> Any:
    """The value at a dotted key; `_ABSENT` where there is none."""
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return _ABSENT
        values = values[name]
    return values


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[name] = value


def _auto_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _auto_keys(value, f"{prefix}{name}.")
        elif value == AUTO:
            yield prefix + name


def _is_stage(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 3


def _nearest(name: str, choices: frozenset[str]) -> str:
    return did_you_mean(name, choices) or f"; expected one of {', '.join(sorted(choices))}"

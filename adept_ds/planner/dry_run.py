"""What a run would do, told without doing it: `launchers/train.py --config FILE --dry-run`.

The backbone is built on the meta device, so nothing is loaded but its config: from a local folder, from the few that
ship with the package (`adept_ds/backbone/architectures`), or from the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from transformers import PreTrainedConfig

from adept_ds.backbone.fp8 import speed_note
from adept_ds.backbone.load import DTYPES, resolve_architecture
from adept_ds.backbone.quantization import unquantized_note
from adept_ds.config.batch import BatchArithmetic, count_steps, learning_rates, warmup_steps
from adept_ds.config.deepspeed import DeepSpeedPlan, complete
from adept_ds.config.loader import LoadedConfig, config_hash, flatten
from adept_ds.config.run import DataConfig, RunConfig, TrainConfig
from adept_ds.data.encode import longest_example
from adept_ds.data.fit import most_positions
from adept_ds.data.own import OwnExamples
from adept_ds.data.problems import load_examples
from adept_ds.data.tasks import check_own_parameters
from adept_ds.data.tasks import count_training_examples as count_task_examples
from adept_ds.distributed import on_gpu
from adept_ds.formats import FORMATS
from adept_ds.model.adapted_model import start_from_source
from adept_ds.planner.deepspeed_values import check_deepspeed_values
from adept_ds.planner.memory import Cluster, MemoryModel, with_sharding
from adept_ds.planner.memory_plan import plan_memory
from adept_ds.planner.memory_report import memory_text
from adept_ds.planner.meta_step import meta_model
from adept_ds.planner.packing import check_packing

SHOWN_SHAPES = 4
"""Trained parameters of one learning rate that are told with their shapes."""


@dataclass(frozen=True)
class Plan:
    """The numbers of a run."""

    architecture_origin: str
    """Where the backbone's config is from."""
    backbone_parameters: int
    unquantized: str | None
    """How much of a quantised backbone stays in its full precision, if that is much."""
    trained_parameters: int
    result_bytes: int
    """Size of adapter_model.safetensors, or of the weights of a whole model where that is the result."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of each trained parameter by name."""
    learning_rate_groups: dict[str, list[str]]
    """Field of `train.learning_rate` to the names of the parameters that it drives."""
    deepspeed: DeepSpeedPlan
    training_examples: int | None
    """None if the data is not there and its size is not known."""
    data_note: str
    """Where the number of examples comes from."""
    total_steps: int | None
    """None if it follows from a number of examples that is not known."""


def dry_run(loaded: LoadedConfig, world_size: int) -> str:
    """Return `make_plan` as text, with the memory that the run needs on this machine.

    Raises:
        UserError: As `make_plan`.
    """
    run, plan = loaded.run, make_plan(loaded.run, world_size)
    architecture, _ = resolve_architecture(run.model)
    dtype, batch, train = DTYPES[run.model.dtype], plan.deepspeed.batch, run.train
    full = run.method.saves_model
    total = plan.backbone_parameters if full else plan.backbone_parameters + plan.trained_parameters
    zero = plan.deepspeed.config["zero_optimization"]
    lines = [
        f"config         {loaded.path} (sha256 of the resolved config: {config_hash(run)[:12]}...)",
        f"backbone       {run.model.name_or_path} ({plan.architecture_origin})",
        f"               {plan.backbone_parameters:,} parameters, {'all trained' if full else 'frozen'}; "
        f"{run.model.dtype}, {plan.backbone_parameters * dtype.itemsize / 1e9:.2f} GB",
        f"method         {run.method.name}: {plan.trained_parameters:,} trainable parameters "
        f"({100 * plan.trained_parameters / total:.4f} % of all{_for_each_task(plan.trained_parameters, run.data)})",
    ]
    if plan.unquantized:
        lines.insert(3, f"               {plan.unquantized}")
    if run.model.quantization == "fp8":
        lines.insert(3, f"               {speed_note(torch.device('cuda' if on_gpu() else 'cpu'), dtype)}")
    if full:
        lines.append(f"result         a model folder with {plan.result_bytes:,} bytes of weights")
    else:
        lines.append(f"adapter        {plan.result_bytes:,} bytes (fp32, adapter_model.safetensors)")
    for group, names in plan.learning_rate_groups.items():
        shapes = ", ".join(f"{name} {list(plan.shapes[name])}" for name in names[:SHOWN_SHAPES])
        if len(names) > SHOWN_SHAPES:
            shapes += f" and {len(names) - SHOWN_SHAPES:,} more"
        lines.append(
            f"learning rate  {getattr(train.learning_rate, group):g} (train.learning_rate.{group}) for {shapes}"
        )
    lines += [
        f"batch          {batch_text(batch)}",
        f"examples       {plan.data_note}",
        f"steps          {_steps_text(plan, train)}",
        *_positions_lines(run, architecture),
        f"warm-up        {_warmup_text(plan, train)}, then {_schedule_text(train)}",
        *([f"loss           {train.loss_note}"] if train.loss_note else []),
        f"DeepSpeed      zero_optimization.stage = {zero.get('stage', 0)}",
    ]
    settings = flatten(plan.deepspeed.config)
    lines += [f"               {key} = {settings[key]} (from {owner})" for key, owner in plan.deepspeed.derived.items()]
    lines.append(memory_text(plan_memory(run, architecture, Cluster.here(world_size))))
    return "\n".join(lines)


def batch_text(batch: BatchArithmetic) -> str:
    """How a global batch is split."""
    if batch.packing is None:
        return (
            f"{batch.global_batch_size} = {batch.micro_batch_size} (micro-batch) x "
            f"{batch.gradient_accumulation_steps} (accumulation) x {batch.world_size} (ranks)"
        )
    return (
        f"{batch.global_batch_size} examples, packed into rows of {batch.packing} tokens (train.packing); "
        f"at most {batch.micro_batch_size} of them in a forward pass (train.micro_batch_size) of each of "
        f"{batch.world_size} ranks, and as many passes as they fill, at most {batch.gradient_accumulation_steps}"
    )


def make_plan(run: RunConfig, world_size: int) -> Plan:
    """Work out what `run` does on `world_size` ranks.

    Raises:
        UserError: The backbone's config cannot be had, the batch does not divide, the data is malformed, DeepSpeed does
            not take a value of its section, the warm-up or the schedule's options do not fit into the run, a task has
            no parameters, or the adapter of `method.init_from` is here and does not fit.
    """
    architecture, origin = resolve_architecture(run.model)
    if run.train.sharding == "auto":
        sharding, _ = MemoryModel(run, architecture, Cluster.here(world_size)).choose()
        run = with_sharding(run, sharding)
    check_packing(run, architecture)
    unused = check_own_parameters(run.data, run.method.prompt_tasks)
    deepspeed = complete(run, world_size, architecture.hidden_size)
    check_deepspeed_values(run.deepspeed, deepspeed)
    model = meta_model(run, architecture)
    source = run.method.adapter_folders.get("method.init_from")
    if source is not None and Path(source).is_dir():  # else it is to be made first, or on the hub
        start_from_source(model, run.method)
    trained, total = model.count_parameters()
    parameters = model.trainable_parameters()
    if run.method.saves_model:
        result_bytes = total * DTYPES[run.model.dtype].itemsize
    else:
        saved = {**parameters, **model.method.constants()}
        tensors = {name: torch.zeros(tensor.shape) for name, tensor in saved.items()}
        result_bytes = len(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    examples, note = count_training_examples(run.data)
    groups = model.learning_rate_groups()
    total_steps = None if examples is None and run.train.epochs else count_steps(run.train, examples or 0)
    if total_steps is not None:
        learning_rates(run.train, groups, total_steps)
    return Plan(
        architecture_origin=origin,
        backbone_parameters=total if run.method.saves_model else total - trained,
        unquantized=unquantized_note(model.backbone),
        trained_parameters=trained,
        result_bytes=result_bytes,
        shapes={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        learning_rate_groups=groups,
        deepspeed=deepspeed,
        training_examples=examples,
        data_note="\n               ".join([note, *unused]),
        total_steps=total_steps,
    )


def count_training_examples(config: DataConfig) -> tuple[int | None, str]:
    """Return the number of training examples and where it is known from. A data set of the hub is not fetched.

    Raises:
        UserError: The data file is there and is malformed.
    """
    if FORMATS[config.format].has_tasks:
        return count_task_examples(config)
    if config.path is not None and not Path(config.path).exists():
        problem_set = FORMATS[config.format].problems
        released = problem_set.released_train_size if problem_set else None
        if released is None:
            return None, f"unknown, {config.path} is not here"
        return released, f"{released:,} for training in the released MBPP; {config.path} is not here"
    examples = load_examples(config, "train")
    notes = examples.notes if isinstance(examples, OwnExamples) else ()
    note = f"{len(examples):,} for training in {config.path or 'the bundled problems'}"
    return len(examples), "\n               ".join([note, *notes])


def _for_each_task(count: int, data: DataConfig) -> str:
    """A count for each of several tasks, as comparisons of multi-task methods have it."""
    tasks = len(data.tasks)
    return f"; {count / tasks:,.0f} for each of {tasks} tasks" if tasks > 1 else ""


def _positions_lines(run: RunConfig, architecture: PreTrainedConfig) -> list[str]:
    """A line where the settings allow more positions than the backbone has."""
    limit = most_positions(architecture)
    longest = max(longest_example(run.data, run.method.num_virtual_tokens, architecture.is_encoder_decoder))
    if limit is None or longest <= limit:
        return []
    return [f"positions      {limit}; the settings allow {longest}, and an example that long would be refused"]


def _steps_text(plan: Plan, train: TrainConfig) -> str:
    if plan.total_steps is None:
        text = f"{train.epochs} epochs; their length is known once the data is here"
    elif train.epochs is None:
        text = f"{plan.total_steps:,}"
    else:
        text = f"{plan.total_steps:,} = {train.epochs} epochs x {plan.total_steps // train.epochs:,}"
    if train.early_stopping_patience is None:
        return text
    return f"{text}; fewer after {train.early_stopping_patience} evaluations without a better figure"


def _warmup_text(plan: Plan, train: TrainConfig) -> str:
    share = "" if train.warmup_ratio is None else f"{100 * train.warmup_ratio:g} % of the steps"
    if plan.total_steps is None:
        return share or f"{train.warmup_steps:,} steps"
    return f"{warmup_steps(train, plan.total_steps):,} steps{share and f' ({share})'}"


def _schedule_text(train: TrainConfig) -> str:
    if train.schedule == "linear":
        return "linear decay to zero"
    options = ", ".join(f"{name} {value}" for name, value in train.schedule_options.items())
    return f"{train.schedule}{options and f' ({options})'}"

"""What a run works out before any weight is loaded: its examples in tokens, and its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from adept_ds.backbone.load import check_attention, load_architecture, load_tokenizer
from adept_ds.config.batch import BatchArithmetic, count_steps, learning_rates
from adept_ds.config.deepspeed import DeepSpeedPlan, complete
from adept_ds.config.run import RunConfig
from adept_ds.data.batches import global_batches
from adept_ds.data.encode import EncodedDataset, encode_prompts
from adept_ds.data.fit import check_examples, check_prompts, check_rows, fit_padding
from adept_ds.data.micro_batches import MicroBatches
from adept_ds.data.problems import load_examples
from adept_ds.data.tasks import TaskExamples, check_own_parameters
from adept_ds.distributed import World
from adept_ds.errors import UserError
from adept_ds.formats import Example
from adept_ds.model.adapted_model import start_from_source
from adept_ds.planner.deepspeed_values import check_deepspeed_values
from adept_ds.planner.memory import decide_sharding
from adept_ds.planner.meta_step import meta_model
from adept_ds.planner.packing import check_packing
from adept_ds.rank_environment import is_main_rank

MEASURED_STEPS = 1_000
"""Of the first epoch, by which the padding of packed rows is told."""


@dataclass(frozen=True)
class RunData:
    """What a run reads."""

    tokenizer: PreTrainedTokenizerBase
    architecture: PreTrainedConfig
    """The backbone's shape."""
    train: EncodedDataset
    validation: EncodedDataset | None

    def micro_batches(self, arithmetic: BatchArithmetic, num_virtual_tokens: int) -> MicroBatches:
        """What makes the micro-batches of training."""
        return MicroBatches(self.train, arithmetic, num_virtual_tokens, self.tokenizer.pad_token_id)

    def packing_summary(self, run: RunConfig, arithmetic: BatchArithmetic) -> str | None:
        """How much of the positions is padding in the first steps, and would be in rows of one example each; None where
        rows are not packed."""
        if arithmetic.packing is None:
            return None
        train, length, ranks = run.train, run.method.num_virtual_tokens, arithmetic.world_size
        batches = global_batches(self.train.lengths, train.global_batch_size, train.seed, 0, train.group_by_length)
        batches = batches[:MEASURED_STEPS]
        padding = self.micro_batches(arithmetic, length).padding(batches)
        share = -(-train.global_batch_size // ranks)
        unpacked = replace(arithmetic, packing=None, micro_batch_size=share, gradient_accumulation_steps=1)
        before = self.micro_batches(unpacked, length).padding(batches)
        return (
            f"packing: {padding:.1%} of all positions are padding, in rows of {arithmetic.packing}; {before:.1%} would "
            "be if a rank's examples of a step were padded to the longest of them"
        )

    def summary(self) -> str:
        """Both splits' sizes and what was cut of them, a line each."""
        validation = self.validation.summary() if self.validation else "none, so the last step counts as the best"
        return f"train: {self.train.summary()}\nvalidation: {validation}"


@dataclass(frozen=True)
class StepPlan:
    """How a run is split over ranks and steps."""

    run: RunConfig
    """The run, with `train.sharding: auto` decided."""
    deepspeed: DeepSpeedPlan
    """The completed `deepspeed` section, and the batch."""
    epoch_steps: int
    total_steps: int
    learning_rates: Callable[[int], dict[str, float]]
    """Number of an optimizer step (the first is 0) to the rate of each parameter group."""

    @property
    def batches(self) -> BatchArithmetic:
        """How a global batch is split."""
        return self.deepspeed.batch

    @property
    def zero_stage(self) -> int:
        """ZeRO stage that the weights are split by."""
        return self.deepspeed.config["zero_optimization"]["stage"]


def prepare_data(run: RunConfig) -> RunData:
    """Read and encode the examples.

    Raises:
        UserError: Tokenizer, backbone config or data cannot be had, or do not fit the settings.
    """
    tokenizer = load_tokenizer(run.model)
    architecture = load_architecture(run.model)
    check_attention(run.model, architecture)
    check_packing(run, architecture)
    if (note := fit_padding(tokenizer, architecture)) and is_main_rank():
        print(note)
    encode = partial(
        EncodedDataset,
        tokenizer=tokenizer,
        cfg=run.data,
        num_virtual_tokens=run.method.num_virtual_tokens,
        encoder_decoder=architecture.is_encoder_decoder,
        show_progress=is_main_rank(),
        prompt_tasks=run.method.prompt_tasks,
    )
    examples = load_examples(run.data, "train")
    for note in task_notes(run, examples) if is_main_rank() else ():
        print(note)
    train = encode(examples)
    validation = load_examples(run.data, "validation")[: run.eval.max_examples]
    if not validation and run.train.early_stopping_patience is not None:
        raise UserError(
            "train.early_stopping_patience needs validation examples, and there are none; hold some out by "
            "data.validation_fraction, or leave it out"
        )
    data = RunData(tokenizer, architecture, train, encode(validation) if validation else None)
    length = run.method.num_virtual_tokens
    check_rows(train, run.train.packing, length)
    for dataset in filter(None, (data.train, data.validation)):
        if (note := check_examples(dataset, tokenizer, architecture, run.method, run.data)) and is_main_rank():
            print(note)
    if run.eval.metric == "pass@1" and validation:
        prompts = encode_prompts(validation, tokenizer, run.data, length, architecture.is_encoder_decoder)
        check_prompts(prompts, tokenizer, architecture, run.method, run.eval.generation.max_new_tokens)
    return data


def task_notes(run: RunConfig, examples: Sequence[Example]) -> list[str]:
    """How many training examples each of several tasks has, and which has none.

    Raises:
        UserError: As `check_own_parameters`.
    """
    if not isinstance(examples, TaskExamples):
        return []
    unused = check_own_parameters(run.data, run.method.prompt_tasks)
    return [*examples.counts(), *unused]


def plan_steps(run: RunConfig, data: RunData, world: World) -> StepPlan:
    """Split batches over the ranks, weights too, and count the steps. Collective.

    Raises:
        UserError: The batch does not divide; the warm-up or the schedule's options do not fit into the run; the method
            cannot be put into the backbone; or it cannot start from its `init_from`.
    """
    if run.model.attn_implementation == "flex_attention" and world.device.type == "cpu":
        raise UserError(
            "model.attn_implementation is 'flex_attention', which has no backward pass on a CPU; expected eager or sdpa"
        )
    decided = decide_sharding(run, data.architecture, world)
    total_steps = count_steps(run.train, len(data.train))
    model = meta_model(run, data.architecture)
    start_from_source(model, run.method)
    deepspeed = complete(decided, world.world_size, data.architecture.hidden_size)
    check_deepspeed_values(run.deepspeed, deepspeed)
    return StepPlan(
        run=decided,
        deepspeed=deepspeed,
        epoch_steps=math.ceil(len(data.train) / run.train.global_batch_size),
        total_steps=total_steps,
        learning_rates=learning_rates(run.train, model.learning_rate_groups(), total_steps),
    )

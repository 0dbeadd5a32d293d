"""Every setting of a run, declared once: type, range, default and meaning. Those of the methods are in
`adept_ds.config.method`.

A run is one JSON file with the sections below. The string under a field is its documentation and its
command-line help. Values are read, merged and reported on by `adept_ds.config.loader`; the `deepspeed`
section is checked and completed by `adept_ds.config.deepspeed`.

Numbers are strict (`true` is not 1, `"7"` is not 7) and an unknown key is an error.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, StrictBool, model_validator
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function, str_schema

from adept_ds.config.base import Count, CountOrZero, FloatFromOne, Fraction, NonNegativeFloat, PositiveFloat, Section
from adept_ds.config.method import AdeptConfig, MethodConfig
from adept_ds.config.schedule import ScheduleName, check_options
from adept_ds.errors import did_you_mean
from adept_ds.formats import FORMATS


class ModelConfig(Section):
    """The backbone."""

    name_or_path: str = Field(min_length=1)
    """Hub id or local folder of the backbone (a `transformers` checkpoint in safetensors)."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository; the default branch if not given."""
    tokenizer: str | None = None
    """Hub id or local folder of the tokenizer; that of the backbone if not given."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of the backbone and of the forward pass. Optimizer states and master weights are fp32 always. fp16 is
    for cards without bf16: the loss is scaled dynamically; encoder-decoder models overflow in it and are refused."""
    quantization: Literal["nf4", "int8", "fp8"] | None = None
    """Keep the weights of the backbone's linear layers (all but the LM head) in 4 bits (NF4, blocks of 64), 8 bits
    (blocks of 256) or 8-bit floats (e4m3, a scale for each output row), and expand them for each product; those of fp8
    are multiplied as they are, with activations and gradients rounded to 8 bits too. They are sharded at ZeRO stage 3
    like any other weight. The speed of fp8 on a GPU has not been measured; elsewhere than on NVIDIA's cards of compute
    capability 8.9 and up it is emulated, which is slow."""
    double_quantization: StrictBool = False
    """For `nf4`: keep the blocks' scales in 8 bits too, 4.13 bits a weight instead of 4.5."""
    keep_expanded: StrictBool = False
    """For `nf4` and `int8` with train.activation_checkpointing: keep the weights of a layer that a backward pass
    recomputes until it is through with that layer, so that a step expands each weight twice and not three times. That
    takes one decoder layer in `dtype`, which the planner counts."""
    quantized_cache: str | None = None
    """Folder in which quantised weights are kept, so that later runs read them instead of converting anew."""
    attn_implementation: str | None = Field(default=None, min_length=1)
    """Attention by `transformers`' name: eager, sdpa, flash_attention_2 (3, 4), flex_attention, or a kernel of the hub
    such as kernels-community/flash-attn2; the choice of `transformers` for the architecture if not given."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.double_quantization and self.quantization != "nf4":
            raise ValueError("double_quantization goes with quantization: nf4")
        if self.keep_expanded and self.quantization not in ("nf4", "int8"):
            raise ValueError("keep_expanded goes with quantization: nf4 or int8, which expand weights")
        if self.quantized_cache is not None and self.quantization is None:
            raise ValueError("quantized_cache goes with quantization")
        return self


class _FormatName:
    """A name of the registry of formats, which also gives the schema its choices."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(_known_format, str_schema(strict=True))

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "enum": list(FORMATS)}


def _known_format(name: str) -> str:
    if name not in FORMATS:
        raise PydanticCustomError(
            "unknown_format",
            "expected one of {names}{near}",
            {"names": ", ".join(FORMATS), "near": did_you_mean(name, FORMATS)},
        )
    return name


class DataConfig(Section):
    """What is trained and evaluated on."""

    format: Annotated[str, _FormatName] = Field(
        default="mbpp-paper",
        description="Form and split of the data: "
        + "; ".join(f"`{name}`: {format.about}" for name, format in FORMATS.items()),
    )
    path: str | None = None
    """JSON lines file (.gz too) with the problems, or a hub id or folder laid out as google-research-datasets/mbpp; the
    bundled problems if not given. For `jsonl`: the training file. For `own`: a file (.jsonl, .json, .csv, .tsv, also
    .gz, or .parquet), a folder of such files, or a hub id. For `tasks`: folder with files TASK/SPLIT.jsonl (or as for
    `own`) that have the hub data set's columns; the hub, or the cache of `datasets`, if not given."""
    tasks: tuple[str, ...] = ()
    """For `tasks`: names from the registry (mnli, qqp, qnli, sst2, stsb, mrpc, rte, cola, multirc, boolq, wic, wsc, cb,
    record, nq, hotpotqa, searchqa, newsqa, squad, winogrande, yelp, scitail, paws), or JSON files that declare others.
    Several are trained on together."""
    variant: Literal["fixed", "faithful"] = "fixed"
    """For `tasks`: each task as it should be, or as the published code has it, which made the paper's figures."""
    mixture: Literal["proportional", "equal", "temperature"] = "proportional"
    """For several `tasks`: all examples of each once an epoch; or smaller tasks repeated up to the largest one's
    number; or between the two, with shares proportional to (examples of the task) ** (1 / `mixture_temperature`), as
    HyperFormer is trained. The largest task comes once an epoch."""
    mixture_temperature: FloatFromOne = 10.0
    """For `mixture: temperature`: 1 is proportional, the higher the nearer to equal."""
    k_shot: Count | None = None
    """For `tasks`: train on so many examples of each, balanced over its labels; on all if not given."""
    k_shot_seed: CountOrZero = 0
    """For `tasks`: seed of the k-shot sample."""
    split_seed: CountOrZero = 42
    """For `tasks`: seed of the permutation that validation and test are cut from, and of repetitions in a mixture. For
    `own`: of the permutation that the held-out rows are taken from."""
    max_source_length: Count | None = None
    """For `tasks`: longest source in tokens, the soft prompt not included; that of each task (256, 348 or 512) if not
    given. A longer one is cut from the right."""
    max_target_length: Count | None = None
    """For `tasks`: longest target in tokens; that of each task (20) if not given. Label words are never cut."""
    hub_ids: dict[str, str] = Field(default={})
    """For `tasks`: hub ids or local folders to load from in place of the registry's, by the registry's name of the data
    set: {"glue": "nyu-mll/glue"}."""
    validation_path: str | None = None
    """For `jsonl` and `own`: the validation file."""
    validation_fraction: Fraction | None = None
    """Where the format has no validation split (the paper's has none): the last part of the training examples to hold
    out for evaluation during training; none if not given. For `own` it is drawn at random, and if not given it is a
    tenth, at most 500 rows, and none of fewer than 20 rows."""
    subset: str | None = None
    """For `own` on the hub: configuration of the data set."""
    train_split: str = "train"
    """For `own` on the hub: the split to train on."""
    validation_split: str | None = None
    """For `own` on the hub: the split for validation; `validation` if not given, where there is one."""
    prompt_field: str | None = None
    """Name of the field with the input; for `jsonl` it is prompt if not given, for `own` it is guessed."""
    context_field: str | None = None
    """For `own`: name of the field with more text for the prompt, which may be empty, such as the input of an
    instruction; guessed if not given."""
    target_field: str | None = None
    """Name of the field with the target; for `jsonl` it is completion if not given, for `own` it is guessed."""
    messages_field: str | None = None
    """For `own`: name of the field with a chat: a list of {role, content} or {from, value}; guessed if not given."""
    prompt_style: Literal["plain", "alpaca", "chat"] | None = None
    """For `own`: how a prompt is shown: as it stands, in Alpaca's published template, or as the user's turn of the
    tokenizer's chat template. If not given: a field called prompt as it stands; others as a user's turn where the
    tokenizer has a chat template, and else an instruction in Alpaca's template and the rest with a line break."""
    max_prompt_length: Count = 325
    """Longest input in tokens, soft prompt included; a longer one is cut from the left."""
    max_length: Count = 581
    """Longest input and target together in tokens, soft prompt included; for encoder-decoder models the target alone
    may have max_length - max_prompt_length tokens. A longer target is cut from the right."""
    few_shot: CountOrZero = 0
    """For `mbpp`: worked examples (from task ids 1 to 10) in front of each prompt. The usual 3 make prompts of some 800
    tokens, for which `max_prompt_length` and `max_length` must leave room."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length must be below max_length, or no token is left for the target")
        format = FORMATS[self.format]
        given = {name for name, field in DataConfig.model_fields.items() if getattr(self, name) != field.default}
        for name in DataConfig.model_fields:
            if name in given - {"format", *format.settings}:
                others = ", ".join(other for other, record in FORMATS.items() if name in record.settings)
                raise ValueError(f"{name} is not for format: {self.format}; it goes with {others}")
        if "mixture_temperature" in given and self.mixture != "temperature":
            raise ValueError(f"mixture_temperature is not for mixture: {self.mixture}; it goes with temperature")
        for name in format.needed:
            if name not in given:
                raise ValueError(f"format: {self.format} needs {name}")
        for name in ("prompt_field", "context_field", "target_field", "prompt_style"):
            if self.messages_field is not None and name in given:
                raise ValueError(f"messages_field is for chats, which have no {name}; give one of the two")
        return self


class LearningRateConfig(Section):
    """Peak learning rate of each parameter group; a method has one or two of them."""

    soft_prompt: PositiveFloat = 1e-3
    """alpha1: of soft prompts."""
    network: PositiveFloat = 1e-3
    """alpha2: of what changes the token embeddings, such as ADePT's token-shared network."""
    adapter: PositiveFloat = 1e-4
    """Of weights that are added to the backbone's layers (low-rank pairs, bottlenecks, scales, biases)."""
    side: PositiveFloat = 3e-3
    """Of a network beside the backbone."""
    backbone: PositiveFloat = 5e-5
    """Of the backbone's own weights."""


class TrainConfig(Section):
    """Optimisation, batches, checkpoints."""

    epochs: Count | None = None
    """Passes over the training examples. Exactly one of `epochs` and `max_steps` is given."""
    max_steps: Count | None = None
    """Optimizer steps."""
    global_batch_size: Count = 4
    """Examples in one optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: Count | None = None
    """Examples in one forward pass of one rank; if not given, what global_batch_size / world size allows. With
    `packing`: rows at most, and one if not given."""
    gradient_accumulation_steps: Count | None = None
    """Forward passes before one optimizer step; follows from the two sizes above and the world size if not given. With
    `packing` it is as many as the examples of a step fill, and must not be given."""
    packing: Count | None = None
    """Tokens of a row in which examples stand one behind another, each with its own soft prompt, positions of its own
    and no sight of the others; an example has a row for itself, padded to the longest, if not given. Optimizer steps
    have the same examples and the same loss either way. Causal models only. At least `data.max_length`."""
    learning_rate: LearningRateConfig = LearningRateConfig()
    """Peak learning rates by parameter group."""
    schedule: ScheduleName = "linear"
    """After warm-up: linear decay to zero at the last step, constant, or another of `transformers`' schedules."""
    schedule_options: dict[str, Any] = Field(default={})
    """What `transformers` calls the schedule's own arguments, such as {"num_cycles": 2} for cosine_with_restarts."""
    warmup_steps: CountOrZero | None = 500
    """Steps of linear warm-up from zero. Must be below the total number of steps. null, if `warmup_ratio` is given."""
    warmup_ratio: Fraction | None = None
    """In place of `warmup_steps`: warm-up as a share of all steps, rounded to the nearest number of them."""
    early_stopping_patience: Count | None = None
    """End the run after so many evaluations, one after the other, without a better figure of `eval.metric`; it takes
    all its steps if not given. The schedule is that of the whole run either way."""
    early_stopping_threshold: NonNegativeFloat = 0.0
    """How much better than the last better one a figure must be to count for `early_stopping_patience`."""
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """AdamW's beta1 and beta2."""
    adam_eps: PositiveFloat = 1e-6
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: NonNegativeFloat = 0.0
    """Global gradient-norm clipping; 0 leaves gradients as they are (the paper's choice)."""
    label_smoothing: Fraction = 0.0
    """Share of each label that the loss of training spreads evenly over the vocabulary, as `label_smoothing` of
    `torch.nn.functional.cross_entropy`. The validation loss is without, so the two are not to be compared."""
    sharding: Literal["auto", "replicate", "node", "global"] | None = None
    """Where the frozen weights live: whole on every rank (`replicate`), split over the ranks of each node (`node`) or
    over all ranks (`global`); `auto` takes the first of these that fits into the memory. It sets
    `deepspeed.zero_optimization.stage`; if not given, that stage decides (3 is `global`, less is `replicate`)."""
    gather: Literal["layer", "weight"] = "layer"
    """What ranks that have split the frozen weights gather at a time: a decoder or encoder `layer`, the next one while
    it is at work, or each `weight` by itself, as DeepSpeed does. With weights on a disk it is `weight` always."""
    activation_checkpointing: StrictBool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    compile: StrictBool = False
    """Compile the backbone's layers in training by `torch.compile`, one compilation for all that are alike: fewer calls
    of the host, same results up to rounding. Needs a C++ compiler, on a GPU also Triton; without them, and where a
    model cannot be compiled, the run says so and goes on as it is. Its speed on a GPU has not been measured."""
    group_by_length: StrictBool = True
    """Put examples of like length in one batch (less padding); the order stays random over the epoch."""
    seed: CountOrZero = 42
    """Seed of initialisation, data order and dropout."""
    save_every: Count | None = None
    """Steps between checkpoints; at each evaluation and at the end if not given."""
    keep_checkpoints: Count = 2
    """Newest checkpoints to keep; the best adapter is kept beside them."""

    @model_validator(mode="before")
    @classmethod
    def _one_warmup(cls, values: Any) -> Any:
        """The default of `warmup_steps` is for runs without a `warmup_ratio`."""
        if isinstance(values, dict) and values.get("warmup_steps") is None:
            has_ratio = values.get("warmup_ratio") is not None
            others = {key: value for key, value in values.items() if key != "warmup_steps"}
            return others | ({"warmup_steps": None} if has_ratio else {})
        return values

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give exactly one of epochs and max_steps")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give one of warmup_steps and warmup_ratio; the other is null, or left out")
        if self.max_steps is not None and (self.warmup_steps or 0) >= self.max_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be below max_steps ({self.max_steps}); {self.shorter_warmup}"
            )
        if self.packing is not None and self.gradient_accumulation_steps is not None:
            raise ValueError(
                "gradient_accumulation_steps does not go with packing: a step has as many forward passes as its "
                "examples fill; set micro_batch_size, in rows, instead"
            )
        check_options(self.schedule, self.schedule_options)
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError("early_stopping_threshold goes with early_stopping_patience")
        return self

    @property
    def loss_note(self) -> str | None:
        """How the training loss differs from the validation loss; None if it does not."""
        if not self.label_smoothing:
            return None
        return (
            f"the training loss is with label smoothing {self.label_smoothing:g} (train.label_smoothing), the "
            "validation loss without; the two are not to be compared"
        )

    @property
    def shorter_warmup(self) -> str:
        """What to set where the warm-up is longer than the run."""
        given = "warmup_steps" in self.model_fields_set
        return f"set train.warmup_ratio 0.1{' and train.warmup_steps null' if given else ''}"


class GenerationConfig(Section):
    """Decoding for pass@1 in training and default of the MBPP evaluation."""

    do_sample: StrictBool = True
    """Sample, or greedy decoding."""
    temperature: PositiveFloat = 0.6
    """Softmax temperature when sampling."""
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.95
    """Nucleus size when sampling."""
    top_k: CountOrZero = 0
    """Keep the k likeliest tokens when sampling; 0 keeps all. The paper's runs had the library default of 50."""
    max_new_tokens: Count = 256
    """Longest completion in tokens."""
    num_samples: Count = 1
    """Samples per problem."""
    stop: tuple[str, ...] | None = None
    """A completion ends before the first of these strings; where the data's format says, and as soon as a program in a
    fence is complete, if not given."""
    batch_size: Count | None = None
    """Samples decoded at a time on one rank; if not given, as many as the memory has room for, a power of two up to 128
    (16 where the backbone wants batches that wait for their longest row). Samples do not depend on it but by rounding,
    which turns a token here and there in 16 bits: set it where others are to get the very same."""
    seed: CountOrZero = 0
    """Every sample's random stream follows from this, its task and its index, not from its batch."""

    @model_validator(mode="after")
    def _check(self) -> GenerationConfig:
        if self.num_samples > 1 and not self.do_sample:
            raise ValueError("num_samples above 1 needs do_sample: true, greedy decoding gives the same sample again")
        return self


class SandboxConfig(Section):
    """How generated programs are run. Nothing model-written runs outside the sandbox."""

    isolation: Literal["auto", "namespaces", "bubblewrap", "seccomp", "none"] = "auto"
    """Isolation tier; `auto` takes the strongest that works here. `none` must be asked for and marks the results."""
    workers: Count | None = None
    """Programs run at a time; the cores of the affinity mask if not given."""
    wall_seconds: PositiveFloat = 20.0
    """Wall-clock limit of one program; generous, since it depends on what else the machine does."""
    cpu_seconds: PositiveFloat = 10.0
    """CPU-time limit of one program with all its processes."""
    memory_mb: Count = 1024
    """Memory limit of one program with all its processes, in MiB."""
    packages: tuple[str, ...] = ()
    """Packages that programs may import beside the standard library, such as numpy; each with all that it needs."""
    cache: str | None = Field(default=None, min_length=1)
    """Folder in which verdicts are kept for equal programs, tests, limits and isolation; none are kept if not given."""


class EvalConfig(Section):
    """Evaluation during training, and the choice of the best checkpoint."""

    every_steps: Count | None = None
    """Steps between evaluations; once an epoch if not given. The last step is evaluated always."""
    metric: Literal["loss", "pass@1", "task"] = "loss"
    """What the best checkpoint is chosen by; `task` is the metric by which each of `data.tasks` chooses (accuracy, F1,
    exact match, ...), averaged over the tasks, of answers that are decoded greedily."""
    max_examples: Count | None = None
    """Evaluate on the first so many validation examples only."""
    batch_size: Count = 8
    """Examples in one forward pass of one rank for the validation loss."""
    generation: GenerationConfig = GenerationConfig()
    """Decoding."""
    sharding: Literal["none", "zero3"] = "none"
    """How the ranks of `adept-ds eval` and `text2text` hold the backbone: `none` has a copy on each, `zero3` splits all
    weights over the ranks, for backbones that one device cannot hold; `deepspeed.zero_optimization.offload_param` is
    followed then. Samples do not depend on it."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What decodes in `adept-ds eval` and `text2text`: the model here on every rank, or vLLM, in an environment of its
    own and on all GPUs of one machine together, on the adapter folded into a whole model."""
    engine_options: dict[str, Any] = Field(default={})
    """Arguments of `vllm.LLM`, handed to it as they are, such as tensor_parallel_size and gpu_memory_utilization."""
    export_cache: str | None = Field(default=None, min_length=1)
    """Folder in which folded models are kept for vLLM; one in the user's cache folder if not given."""
    sandbox: SandboxConfig = SandboxConfig()
    """Execution."""

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.sharding == "zero3" and self.engine == "vllm":
            raise ValueError(
                "sharding zero3 is for engine transformers; vLLM splits a model by engine_options "
                '{"tensor_parallel_size": N}'
            )
        return self

    def gain(self, value: float, reference: float | None) -> float:
        """By how much a figure of `metric` is better than another; NaN and infinity are worse than any and than none,
        and any other is better than none."""
        if not math.isfinite(value):
            return -math.inf
        if reference is None or not math.isfinite(reference):
            return math.inf
        return reference - value if self.metric == "loss" else value - reference


class LoggingConfig(Section):
    """The run folder and what is written to it."""

    run_dir: str = Field(default="runs/default", min_length=1)
    """Folder of this run: resolved config, metrics, checkpoints, best adapter, report."""
    every_steps: Count = 10
    """Steps between lines of metrics.jsonl and the console."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers by their Accelerate name (tensorboard, wandb, mlflow, ...). metrics.jsonl is written always."""
    project: str = Field(default="adept_ds", min_length=1)
    """Project name for trackers that have one."""
    upload_result: StrictBool = False
    """Put the best adapter (or model) into the trackers too when the run is finished, where they take files (wandb,
    mlflow)."""


class RunConfig(Section):
    """One run: `deepspeed launchers/train.py --config FILE`."""

    about: str = Field(default="", alias="_about")
    """What the file reproduces, on which hardware, and the figure to expect. JSON has no comments."""
    model: ModelConfig
    """The backbone."""
    method: MethodConfig = AdeptConfig()
    """The tuning method and its settings, which depend on its name."""
    data: DataConfig = DataConfig()
    """Problems and their form."""
    train: TrainConfig
    """Optimisation, batches, checkpoints."""
    eval: EvalConfig = EvalConfig()
    """Evaluation during training."""
    logging: LoggingConfig = LoggingConfig()
    """Run folder, metrics, trackers."""
    deepspeed: dict[str, Any] = Field(default={})
    """Handed to DeepSpeed after the checks of `adept_ds.config.deepspeed`; batch sizes, clipping and precision belong
    to the sections above and are "auto" or absent here."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        format = FORMATS[self.data.format]
        if not format.has_tasks and self.method.num_virtual_tokens >= self.data.max_prompt_length:
            raise ValueError("method.num_virtual_tokens must be below data.max_prompt_length, which includes it")
        if self.method.prompt_tasks and not format.has_tasks:
            raise ValueError(f"method.tasks needs data.format: tasks; data.format {self.data.format} has none")
        for task in self.data.tasks if self.method.prompt_tasks else ():
            # A task of the user's own may have another name than its file.
            if task not in self.method.prompt_tasks and not task.endswith(".json"):
                raise ValueError(f"data.tasks has {task!r}; expected tasks of method.tasks: {self.method.prompt_tasks}")
        if self.model.quantization is not None and not self.method.works_quantized:
            raise ValueError(
                f"method.name {self.method.name} trains weights of the backbone, which have no gradients in the form "
                "that model.quantization gives them; leave model.quantization out, or choose another method"
            )
        if self.model.keep_expanded and not self.train.activation_checkpointing:
            raise ValueError(
                "model.keep_expanded goes with train.activation_checkpointing; without it all weights would be kept in "
                "full, which is what no quantisation does"
            )
        if self.train.activation_checkpointing and not self.method.works_checkpointed:
            raise ValueError(
                f"method.name {self.method.name} puts keys and values into the layers' caches, which they do not read "
                "where train.activation_checkpointing recomputes them; set one of the two otherwise"
            )
        if self.eval.metric == "pass@1" and format.problems is None:
            raise ValueError(f"eval.metric pass@1 needs problems with tests; data.format {self.data.format} has none")
        if self.train.sharding == "node" and self.method.trains_backbone:
            raise ValueError(
                f"train.sharding node is for frozen weights, and method.name {self.method.name} trains them; expected "
                "global or replicate"
            )
        if self.eval.metric == "task" and not format.has_tasks:
            raise ValueError(f"eval.metric task needs data.format: tasks; data.format {self.data.format} has no metric")
        return self

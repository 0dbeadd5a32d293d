"""The settings of every tuning method: the section `method`, whose `name` says which of these classes it is.

A further method is a class here, named in `MethodConfig`, and its implementation in `adept_ds.methods`. Its fields are
its keys of a config file, their docstrings its help.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, StrictBool, model_validator
from typing_extensions import override

from adept_ds.config.base import Count, CountOrZero, Fraction, PositiveFloat, Section

DEFAULT_METHOD = "adept"
"""The method of a config that names none."""
CONSTANTS = ("sources", "vera_A", "vera_B")
"""Names of the tensors that methods keep in the adapter file and never train."""


class MethodSettings(Section):
    """Base of every method's settings. Those of a method with a soft prompt have a field `num_virtual_tokens`, all
    others are a `PromptlessSettings`."""

    name: str
    """The method."""

    works_quantized: ClassVar[bool] = True
    """Whether the backbone may be quantised, since none of the weights that are trained would be."""
    trains_backbone: ClassVar[bool] = False
    """Whether weights of the backbone's own are trained, so that what ZeRO does for frozen ones alone is not for it."""
    saves_model: ClassVar[bool] = False
    """Whether the result is a whole model in the hub's format (`adept_ds.storage.model_folder`) and not an adapter."""
    works_checkpointed: ClassVar[bool] = True
    """Whether layers may be recomputed in the backward pass; they see no cache then."""

    @property
    def prompt_tasks(self) -> tuple[str, ...]:
        """Tasks with a soft prompt or other parameters of their own, in their order; none where all are trained
        alike."""
        return ()

    @property
    def adapter_folders(self) -> dict[str, str]:
        """Adapters that training starts from, by the setting that names each."""
        return {}

    @property
    def decoder_positions(self) -> int:
        """Positions that are taken in front of what the decoder reads, soft prompt aside."""
        return 0


class PromptlessSettings(MethodSettings):
    """Base for methods that put no tokens in front of the input."""

    @property
    def num_virtual_tokens(self) -> int:
        """Soft-prompt tokens in front of the input."""
        return 0


class AdapterSettings(MethodSettings):
    """Base for methods that leave the backbone's weights as they are."""

    init_from: str | None = Field(default=None, min_length=1)
    """Adapter folder (or hub id) whose values are the starting point: of the same method, settings of the same sizes,
    and the same backbone, trained on a source task (SPoT; the paper's few-shot protocol). Training starts as
    initialised below if not given."""

    @property
    def source_prompts(self) -> dict[str, str]:
        """Adapters of source tasks, of method `pt`, by the setting that names each."""
        return {}

    @property
    @override
    def adapter_folders(self) -> dict[str, str]:
        return self.source_prompts | ({} if self.init_from is None else {"method.init_from": self.init_from})


class TaskSettings(AdapterSettings):
    """Base for methods that can train parameters of their own for each of several tasks."""

    tasks: tuple[str, ...] = ()
    """Tasks with parameters of their own, by their names in `data.tasks`. If not given, there is one set of parameters
    for whatever is trained."""

    @property
    @override
    def prompt_tasks(self) -> tuple[str, ...]:
        return self.tasks

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks are {list(self.tasks)}, one of them twice")
        return self


class TaskStartSettings(TaskSettings):
    """Base for those whose tasks may start from another task's parameters."""

    task_from: str | None = Field(default=None, min_length=1)
    """With `init_from` an adapter of several tasks: the one whose parameters every task starts at. If not given, each
    task starts at those of its own name."""

    @model_validator(mode="after")
    def _check_task_from(self) -> Self:
        if self.task_from is not None and self.init_from is None:
            raise ValueError("task_from names a task of the adapter that init_from gives, which is missing")
        return self


class PromptSettings(AdapterSettings):
    """Base for methods with a soft prompt of free vectors."""

    num_virtual_tokens: CountOrZero
    """Length l of the soft prompt, in tokens. 0 leaves the prompt out."""
    prompt_init: Literal["tokens", "text", "normal"] = "tokens"
    """Where P starts: embeddings of tokens sampled among the first 5,000 ids, of a text's tokens, or a normal draw."""
    prompt_init_text: str | None = None
    """The text for `prompt_init: text`, without special tokens, repeated or cut to l tokens."""
    prompt_init_std: PositiveFloat | None = None
    """Standard deviation for `prompt_init: normal`; that of the embedding table if not given."""

    @model_validator(mode="after")
    def _check_prompt_init(self) -> Self:
        if (self.prompt_init == "text") != (self.prompt_init_text is not None):
            raise ValueError("prompt_init_text goes with prompt_init: text, and is needed there")
        if self.prompt_init_std is not None and self.prompt_init != "normal":
            raise ValueError("prompt_init_std goes with prompt_init: normal")
        return self


class OffsetSettings(PromptSettings):
    """Base for methods with a soft prompt and an offset to the tokens' embeddings that evaluation can leave out."""

    num_virtual_tokens: CountOrZero = 7
    """Length l of the soft prompt, in tokens. 0 leaves the prompt out."""
    offset_in_evaluation: StrictBool = True
    """Whether the offset is added in evaluation and generation too; without it the soft prompt is left alone (table
    11 of the paper)."""


class AdeptConfig(OffsetSettings):
    """ADePT (eq. 3 and 4 of the paper): soft prompt P [l, d] and token-shared network of bottleneck r."""

    name: Literal["adept"] = "adept"
    """The method."""
    bottleneck: Count = 1
    """Width r of the token-shared network's hidden layer."""
    down_init: Literal["published", "linear"] = "published"
    """Bounds of W_down's uniform draw: 1/sqrt(r) (the published code) or 1/sqrt(d) (the usual linear-layer rule)."""
    dropout: Fraction = 0.0
    """Dropout on the bottleneck's activations in training. The paper has none; the published code has 0.1."""


class PromptTuningConfig(PromptSettings):
    """Prompt tuning (PT): the soft prompt P [l, d] alone."""

    name: Literal["pt"] = "pt"
    """The method."""
    num_virtual_tokens: Count = 10
    """Length l of the soft prompt, in tokens. The paper has 10 for decoder-only models and 100 for T5."""


class DeptConfig(OffsetSettings):
    """DePT (eq. 2 of the paper): soft prompt P [l, d] and an offset 8 / sqrt(r) A B that depends on the position."""

    name: Literal["dept"] = "dept"
    """The method."""
    rank: Count = 3
    """Rank r of the offsets: A [max_positions, r], B [r, d]."""
    max_positions: Count = 581
    """Positions with an offset, counted from the first token behind the prompt; tokens further on have none."""
    cyclic_shift: CountOrZero = 0
    """Take the offset of the position so many places further on, modulo `max_positions` (table 1 of the paper)."""


class PromptEmbeddingConfig(PromptSettings):
    """Prompt and embedding matrix (table 10 of the paper): soft prompt P [l, d] and a free offset for every token."""

    name: Literal["pt_embedding"] = "pt_embedding"
    """The method."""
    num_virtual_tokens: CountOrZero = 10
    """Length l of the soft prompt, in tokens. 0 leaves the prompt out."""


class PTuningConfig(AdapterSettings):
    """P-tuning (https://arxiv.org/abs/2103.10385): a soft prompt that a small network makes, by HF PEFT."""

    name: Literal["p_tuning"] = "p_tuning"
    """The method."""
    num_virtual_tokens: Count = 10
    """Length of the soft prompt, in tokens."""
    reparameterization: Literal["mlp", "lstm"] = "mlp"
    """The network: an MLP of three layers, or a bidirectional LSTM with two layers behind it."""
    hidden_size: Count | None = None
    """Width of the network; that of the embeddings if not given."""


class DptConfig(AdapterSettings):
    """DPT, decomposed prompt tuning (https://arxiv.org/abs/2310.10094): a soft prompt of low rank, P = A B."""

    name: Literal["dpt"] = "dpt"
    """The method."""
    num_virtual_tokens: Count = 10
    """Length l of the soft prompt, in tokens. Its paper has 100 for T5."""
    rank: Count = 10
    """Rank r of the prompt: A [l, r], B [r, d]."""


class ResidualPromptConfig(PromptSettings):
    """Residual prompt tuning (https://arxiv.org/abs/2305.03937): a soft prompt P [l, d] and what a small network that
    its tokens share adds to each of them."""

    name: Literal["residual_pt"] = "residual_pt"
    """The method."""
    num_virtual_tokens: Count = 10
    """Length l of the soft prompt, in tokens. Its paper has 10, the comparison with DPT 100."""
    bottleneck: Count = 400
    """Width r of the network's hidden layer. Its code has 800."""


class MptConfig(TaskSettings, PromptSettings):
    """MPT (https://arxiv.org/abs/2303.02861): a soft prompt P [l, d] that tasks share, times a low-rank matrix of each
    task's own; by HF PEFT. First trained on source tasks, from their teachers; then, by `init_from`, on the target."""

    name: Literal["mpt"] = "mpt"
    """The method."""
    num_virtual_tokens: Count = 10
    """Length l of the soft prompt, in tokens. The paper has 100 for T5."""
    tasks: tuple[str, ...] = ()
    """Tasks with factors of their own, by their names in `data.tasks`. If not given, whatever is trained has the same
    factors, as a target task has."""
    rank: Count = 1
    """Rank of each task's matrix."""
    factor_init: Literal["published", "ones"] = "published"
    """Where the factors start: draws of standard deviation 0.02 (the authors' code; the prompt is then near zero), or
    values that leave P as it is."""
    factors_from: str | None = Field(default=None, min_length=1)
    """With `init_from`: the one of that adapter's tasks whose factors every task starts at. If not given, each starts
    at those of its own name, or at the mean of all where the adapter has none of that name."""
    teachers: dict[str, str] = Field(default={})
    """Adapter folder of each source task's teacher, by the task's name: of method `pt`, the same length, and the same
    backbone. No distillation if not given."""
    distillation_weight: PositiveFloat = 1.0
    """Factor of the teachers' part of the loss."""
    distillation_temperature: PositiveFloat = 1.0
    """Temperature of the predictions that are compared."""

    @property
    @override
    def source_prompts(self) -> dict[str, str]:
        """The teachers, in the order of the tasks."""
        return {f"method.teachers.{task}": self.teachers[task] for task in self.tasks if self.teachers}

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        if self.teachers and set(self.teachers) != set(self.tasks):
            raise ValueError(
                f"teachers are of {sorted(self.teachers) or 'no task'}; expected one for each of tasks, which are "
                f"{sorted(self.tasks)}"
            )
        if self.factors_from is not None and self.init_from is None:
            raise ValueError("factors_from names a task of the adapter that init_from gives, which is missing")
        return self


class AttemptConfig(TaskStartSettings, PromptSettings):
    """ATTEMPT (https://arxiv.org/abs/2205.11961): a soft prompt P [l, d] plus a mixture of it and of frozen prompts of
    source tasks, with weights that a small network of width r finds for each input. With `tasks` each has a prompt of
    its own, and all share the network."""

    name: Literal["attempt"] = "attempt"
    """The method."""
    num_virtual_tokens: Count = 10
    """Length l of all prompts, in tokens. The paper has 100 for T5."""
    prompt_init: Literal["tokens", "text", "normal", "source"] = "tokens"  # type: ignore[assignment]
    """Where P starts: embeddings of tokens sampled among the first 5,000 ids, of a text's tokens, a normal draw, or the
    first of `sources`, as all tasks' prompts do in the published code."""
    sources: tuple[str, ...] = Field(min_length=1)
    """Adapter folders of the source tasks' prompts: of method `pt`, the same length, and the same backbone."""
    bottleneck: Count = 100
    """Width r of the network's hidden layer."""
    temperature: PositiveFloat | None = None
    """Temperature of the softmax over the prompts; e d if not given, as published."""

    @property
    @override
    def source_prompts(self) -> dict[str, str]:
        return {f"method.sources[{number}]": folder for number, folder in enumerate(self.sources)}


class PrefixTuningConfig(AdapterSettings, PromptlessSettings):
    """Prefix tuning (https://arxiv.org/abs/2101.00190): trained keys and values in front of every decoder layer's, by
    HF PEFT."""

    works_checkpointed: ClassVar[bool] = False

    name: Literal["prefix"] = "prefix"
    """The method."""
    prefix_length: Count = 10
    """Number of keys and values in front of each layer's."""
    projection: StrictBool = False
    """Make them from embeddings by an MLP instead of training them themselves."""
    hidden_size: Count | None = None
    """Width of that MLP; that of the embeddings if not given."""

    @property
    @override
    def decoder_positions(self) -> int:
        return self.prefix_length


class LoraConfig(AdapterSettings, PromptlessSettings):
    """LoRA (https://arxiv.org/abs/2106.09685): W x + alpha / r B A x, by HF PEFT."""

    name: Literal["lora"] = "lora"
    """The method."""
    rank: Count = 16
    """Rank r. The paper has 16 for decoder-only models and 35 for T5-3B."""
    alpha: PositiveFloat = 32.0
    """Numerator of the scale alpha / r."""
    dropout: Fraction = 0.1
    """Dropout on the layer's input, for the low-rank pair alone."""
    target_modules: tuple[str, ...] | None = None
    """Ends of the names of the layers that get a pair. If not given: queries, keys and values of decoder-only models,
    queries and values of T5, as in the paper; in a backbone that is not built like T5, Llama, CodeGen or GPT-2, HF
    PEFT's choice for its model type."""


class Ia3Config(AdapterSettings, PromptlessSettings):
    """(IA)3 (https://arxiv.org/abs/2205.05638): trained scales of keys and values, by HF PEFT."""

    name: Literal["ia3"] = "ia3"
    """The method."""
    feed_forward: StrictBool = False
    """Scale the inputs of the feed-forward layers' last projection too, as (IA)3 was published; the parameters that
    the paper counts for it (55.3K on T5-base) are those of keys and values."""
    target_modules: tuple[str, ...] | None = None
    """Ends of the names of the layers whose outputs are scaled. If not given: those of keys and values; in a backbone
    that is not built like T5, Llama, CodeGen or GPT-2, HF PEFT's choice for its model type."""


class VeraConfig(AdapterSettings, PromptlessSettings):
    """VeRA (https://arxiv.org/abs/2310.11454): W x + diag(b) B diag(d) A x with frozen random A and B that all layers
    share, and trained vectors b and d of each layer, by HF PEFT."""

    name: Literal["vera"] = "vera"
    """The method."""
    rank: Count = 256
    """Rank r of A and B."""
    d_initial: PositiveFloat = 0.1
    """What every entry of d starts at; b starts at zero."""
    dropout: Fraction = 0.0
    """Dropout on the layer's input, for what is added alone."""
    target_modules: tuple[str, ...] | None = None
    """Ends of the names of the layers that get the vectors. If not given: as for method lora."""


class BottleneckSettings(TaskStartSettings, PromptlessSettings):
    """Base of the methods with bottleneck adapters. With `tasks` each has adapters of its own, and all share the
    norms."""

    bottleneck: Count = 24
    """Width r of the adapters."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """Between the two projections."""
    train_norms: StrictBool = True
    """Train the weights of all layer norms too, which the paper's counts include."""
    post_norm: StrictBool = False
    """A layer norm behind each adapter, in front of the sum, as HyperFormer's baseline has (the row Adapter (m))."""


class AdapterConfig(BottleneckSettings):
    """Bottleneck adapters (Houlsby et al., https://arxiv.org/abs/1902.00751) behind the self-attention and the
    feed-forward part of every layer: x + W_up act(W_down x + b_down) + b_up."""

    name: Literal["adapter"] = "adapter"
    """The method."""


class AdapterDropConfig(BottleneckSettings):
    """AdapterDrop (https://arxiv.org/abs/2010.11918): bottleneck adapters in all but the lowest layers."""

    name: Literal["adapter_drop"] = "adapter_drop"
    """The method."""
    dropped_layers: CountOrZero = 5
    """Number of lowest layers without adapters; of encoder and decoder each."""


class HyperFormerConfig(TaskStartSettings, PromptlessSettings):
    """HyperFormer++ (https://arxiv.org/abs/2106.04489): bottleneck adapters, and layer norms behind them, that a
    network makes for each task, layer and place in it; the weights of the backbone's layer norms are trained too."""

    name: Literal["hyperformer"] = "hyperformer"
    """The method."""
    tasks: tuple[str, ...] = ()
    """Tasks with an embedding of their own, by their names in `data.tasks`. If not given, there is one for whatever is
    trained."""
    bottleneck: Count = 24
    """Width of the adapters. Its paper has 24 or 48 for T5-base, by validation."""
    embedding_size: Count = 64
    """Width of the embeddings of tasks, layers and places, and of what the network makes of the three."""
    hidden_size: Count = 128
    """Width of that network's hidden layer."""
    train_norms: StrictBool = True
    """Train the weights of all layer norms too, as published."""


class HyperDecoderConfig(AdapterSettings, PromptlessSettings):
    """HyperDecoder (https://arxiv.org/abs/2203.08304): bottleneck adapters beside the feed-forward part of every layer
    of an encoder-decoder model; those of the decoder are made for each input, from what the encoder makes of it."""

    name: Literal["hyperdecoder"] = "hyperdecoder"
    """The method."""
    bottleneck: Count = 64
    """Width of the adapters."""
    hidden_size: Count = 128
    """Width of the hidden layer of the network that makes the decoder's adapters."""
    layer_embedding_size: Count = 10
    """Width of that network's embedding of a layer."""
    process_encoder: StrictBool = False
    """An MLP between the encoder's mean and that network, which today's published code has and the paper's figures have
    not."""


class BitFitConfig(AdapterSettings, PromptlessSettings):
    """BitFit (https://arxiv.org/abs/2106.10199): a term of its own for every bias. A backbone without biases gets them,
    starting at zero, in all linear layers (the LM head too) and in the layer norms of its blocks."""

    name: Literal["bitfit"] = "bitfit"
    """The method."""


class LstConfig(AdapterSettings, PromptlessSettings):
    """Ladder side tuning (LST, https://arxiv.org/abs/2206.06522): a narrow network beside the backbone, which reads its
    layers and through which alone gradients go; at the rate `train.learning_rate.side`."""

    name: Literal["lst"] = "lst"
    """The method."""
    reduction: Count = 8
    """The backbone's widths divided by those of the side network, r."""
    layers: tuple[CountOrZero, ...] | None = Field(default=None, min_length=1)
    """Layers of the backbone with one of the side network beside them, counted from 0, of encoder and decoder each; all
    if not given. Published for T5-base: 1, 2, 3, 5, 6, 7, 9, 10, 11; T5-large: the odd ones; T5-3B: 23."""
    init: Literal["random", "magnitude"] = "random"
    """Where the side network's layers start: drawn as those of a new model, or what is left of the backbone's when the
    smallest rows and columns are cut away (T5, Llama and those built like them; the published figures, of T5, cut by
    the size of gradients)."""

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers are {list(self.layers)}; expected ascending numbers, each once")
        return self


class FullConfig(PromptlessSettings):
    """Full fine-tuning: every weight of the backbone is trained, at the rate `train.learning_rate.backbone`."""

    works_quantized: ClassVar[bool] = False
    trains_backbone: ClassVar[bool] = True
    saves_model: ClassVar[bool] = True

    name: Literal["full"] = "full"
    """The method."""
    max_file_gb: PositiveFloat = 1.0
    """Largest weight file of the saved model, in GB; while saving, rank 0 holds as much in its host memory."""


def _named(section: Any) -> Any:
    return {"name": DEFAULT_METHOD, **section} if isinstance(section, dict) else section


MethodConfig = Annotated[
    AdeptConfig
    | PromptTuningConfig
    | DeptConfig
    | PromptEmbeddingConfig
    | PTuningConfig
    | DptConfig
    | ResidualPromptConfig
    | MptConfig
    | AttemptConfig
    | PrefixTuningConfig
    | LoraConfig
    | Ia3Config
    | VeraConfig
    | AdapterConfig
    | AdapterDropConfig
    | HyperFormerConfig
    | HyperDecoderConfig
    | BitFitConfig
    | LstConfig
    | FullConfig,
    Field(discriminator="name"),
    BeforeValidator(_named),
]
"""Settings of any method, told apart by their `name`."""

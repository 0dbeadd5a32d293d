"""A frozen backbone with a tuning method in it, with the surface that PEFT users know.

Train:
    backbone = AutoModelForCausalLM.from_pretrained(...)
    model = get_adept_model(backbone, AdeptConfig(num_virtual_tokens=7, bottleneck=1), tokenizer)
    model.print_trainable_parameters()
    model(input_ids, attention_mask, labels=labels).loss.backward()
    model.save_pretrained("adapter")

Use, on a backbone as it is:
    model = AdaptedModel.from_pretrained(backbone, "adapter")
    model.generate(input_ids=input_ids, attention_mask=attention_mask)
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput

from adept_ds.backbone.compiled_blocks import compile_blocks
from adept_ds.backbone.frozen_linear import replace_frozen_linears
from adept_ds.backbone.hub import push_folder
from adept_ds.backbone.sharding import full_numel
from adept_ds.config.method import AdapterSettings, FullConfig, MethodConfig
from adept_ds.contexts import attribute_set
from adept_ds.distributed import World
from adept_ds.errors import UserError
from adept_ds.methods import Method, Untuned, create_method
from adept_ds.methods.base import load_values
from adept_ds.methods.mixed import MixedAdapters
from adept_ds.methods.soft_prompt import inserted
from adept_ds.model.distillation import last_hidden_states, teacher_states
from adept_ds.model.logits_tail import trace_tail
from adept_ds.model.loss import IGNORE_INDEX, LossHead, shift_labels
from adept_ds.model.packing import PackedRows
from adept_ds.model.prompt_hiding import plain_ids, prompt_hidden
from adept_ds.storage import adapter_folder, model_folder
from adept_ds.storage.model_card import README_NAME, make_card, read_subject


class AdaptedModel(nn.Module):
    """A backbone and the method that was injected into it.

    The method's soft prompt is put in front of the input here, so callers pass plain token ids everywhere.

    Args:
        backbone: A causal or encoder-decoder language model. It is changed in place, and frozen but for what the method
            trains.
        method: A method that has not been injected yet.
        tokenizer: Needed where the method's initialisation starts from text.
        seed: Seed of the initialisation; None where trained values will be loaded.

    Raises:
        UserError: The backbone has been adapted before.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        method: Method,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        # Untyped, as transformers leaves its models' calls and `generate`.
        self.backbone: Any = backbone
        self.method = method
        self.is_encoder_decoder: bool = backbone.config.is_encoder_decoder
        if isinstance(backbone.get_output_embeddings(), LossHead):
            raise UserError(f"{backbone.config.name_or_path!r} has a method in it already; load the backbone anew")
        self.backbone_facts = adapter_folder.backbone_facts(backbone)
        self.vocabulary_size: int = self.backbone_facts["vocab_size"]
        backbone.requires_grad_(False)
        tail = trace_tail(backbone)
        method.inject(backbone, tokenizer, None if seed is None else torch.Generator().manual_seed(seed))
        backbone.set_output_embeddings(LossHead(backbone.get_output_embeddings(), tail))
        replace_frozen_linears(backbone)
        self._enabled = True

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name to parameter of all that is trained, under the names of the adapter file."""
        return self.method.trained_parameters()

    def learning_rate_groups(self) -> dict[str, list[str]]:
        """Field of `train.learning_rate` to the names of the parameters that it drives."""
        groups: dict[str, list[str]] = {}
        for name in self.trainable_parameters():
            groups.setdefault(self.method.learning_rate_group(name), []).append(name)
        return groups

    def count_parameters(self) -> tuple[int, int]:
        """Return (trainable, all) parameters; shared tensors count once, sharded ones with their full size."""
        trainable = sum(full_numel(parameter) for parameter in self.trainable_parameters().values())
        return trainable, sum(full_numel(parameter) for parameter in self.parameters())

    def checkpoint_activations(self) -> None:
        """Keep each layer's input only in training, and compute the layer again in the backward pass."""
        options: dict[str, Any] = {"use_reentrant": False}
        if self.method.batch is not None:
            options["context_fn"] = self.method.batch.recomputed
        self.backbone.activation_checkpointing_enable(options)
        # Gradients flow from the trained parameters; a table that they need not reach would be gathered for nothing.
        self.backbone.disable_input_require_grads()

    def compile_blocks(self, say: Callable[[str], None] | None = None) -> None:
        """Have the backbone's layers compiled in training, when they are first called; see `compiled_blocks`.

        Args:
            say: Is told of each compilation, and once why if it does not work: layers then run as they are.
        """
        compile_blocks(self.backbone, say=say or (lambda _: None))

    def print_trainable_parameters(self) -> None:
        """Print the counts in PEFT's form."""
        trainable, total = self.count_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")

    @property
    def num_virtual_tokens(self) -> int:
        """Soft-prompt tokens that are put in front of the input now."""
        return self.method.num_virtual_tokens if self._enabled else 0

    @property
    def prompt_tasks(self) -> tuple[str, ...]:
        """Tasks with parameters of their own, in the order of `task_ids`; none where all are read alike now."""
        return self.method.config.prompt_tasks if self.method.config and self._enabled else ()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute what the plain backbone does inside the block."""
        with self.method.disabled(), attribute_set(self, "_enabled", False):
            yield

    def add_prompt(
        self, input_ids: Tensor, attention_mask: Tensor | None, prompts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Put the prompt's ids directly before each row's tokens: behind left padding, before the first real token.

        Args:
            input_ids: Token ids [B, S].
            attention_mask: 1 for tokens, 0 for padding on either side [B, S]; all ones if not given.
            prompts: Number k of each row's prompt [B]; the first one if not given.

        Returns:
            Ids [B, l + S] with token i of prompt k as V + k l + i, and the mask that goes with them.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if input_ids.device.type == "cpu":
            self.check_ids(int(input_ids.max()))
        if prompts is None:
            prompts = input_ids.new_zeros(input_ids.shape[0])
        ids, prompt_mask = self.prompt_ids(prompts)
        first = attention_mask.argmax(1, keepdim=True)
        return inserted(input_ids, ids, first), inserted(attention_mask, prompt_mask, first)

    def prompt_ids(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids of soft prompts of these numbers [B], and which of their tokens are there, both [B, l]."""
        length = self.num_virtual_tokens
        ids = self.vocabulary_size + torch.arange(length, device=prompts.device) + length * prompts[:, None]
        return ids, self.method.prompt_mask(prompts) if length else ids

    def check_ids(self, highest: int) -> None:
        """Refuse token ids that the backbone has no vector for; those of prompts are not among them.

        Raises:
            UserError: The highest of them is none of the vocabulary.
        """
        if highest >= self.vocabulary_size:
            raise UserError(
                f"id {highest} is none of the {self.vocabulary_size} of the backbone's table; is the tokenizer that of "
                "another model, or has it tokens that the model lacks?"
            )

    def load_adapters(self, adapters: Mapping[str, str | Path]) -> None:
        """Load adapters by name beside one another, for `adapter_names` of `forward` and `generate`.

        The backbone must have no method of its own: `AdaptedModel(backbone, Untuned())`. Adapters that were loaded
        before stay; one of the same name is replaced.

        Raises:
            UserError: An adapter is not whole, belongs to another backbone, or is of a method whose vectors depend on
                more than the token; or the model has a method already.
        """
        if not isinstance(self.method, Untuned | MixedAdapters):
            raise UserError(
                "load_adapters: this model has a method of its own in it; expected AdaptedModel(backbone, Untuned())"
            )
        loaded = {name: adapter_folder.load_adapter(folder) for name, folder in adapters.items()}
        for adapter in loaded.values():
            adapter_folder.check_backbone(adapter, self.backbone_facts)
        if isinstance(self.method, Untuned):
            self.method = MixedAdapters()
            self.method.inject(self.backbone, None, None)
        self.method.add({name: (adapter, create_method(adapter.method)) for name, adapter in loaded.items()})

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Of the adapters that `load_adapters` has loaded."""
        return self.method.names if isinstance(self.method, MixedAdapters) else ()

    def prompt_length(self, adapter: str | None) -> int:
        """Soft-prompt tokens of one of the adapters of `load_adapters`; those of the model if it has none."""
        return self.method.length(adapter) if isinstance(self.method, MixedAdapters) else self.num_virtual_tokens

    def _packed(self, input_ids: Tensor, attention_mask: Tensor, example_ids: Tensor) -> PackedRows:
        """Take rows as packed ones."""
        if self.is_encoder_decoder:
            raise UserError("example_ids are for causal models, whose examples can stand one behind another in a row")
        if isinstance(self.method, MixedAdapters) or (not self._enabled and self.method.num_virtual_tokens):
            raise UserError("packed rows have room for the soft prompt of one adapter, and are read with that one only")
        attention = self.backbone.config._attn_implementation
        return PackedRows(input_ids, attention_mask, example_ids, self.num_virtual_tokens, attention)

    def row_prompts(
        self, input_ids: Tensor, task_ids: Tensor | None, adapter_names: Sequence[str | None] | None
    ) -> Tensor:
        """Return the number of each row's prompt [B]; arguments and errors as of `forward`."""
        rows = input_ids.shape[0]
        if isinstance(self.method, MixedAdapters):
            if adapter_names is None or len(adapter_names) != rows:
                raise UserError(
                    f"adapter_names must say for each of {rows} rows which of {', '.join(self.method.names)} reads it, "
                    "or None for none"
                )
            return self.method.numbers(adapter_names).to(input_ids.device)
        if adapter_names is not None:
            raise UserError("adapter_names go with load_adapters; this model has one adapter, or none")
        tasks = self.prompt_tasks
        if tasks and task_ids is None:
            raise UserError(
                f"each of {', '.join(tasks)} has values of its own: task_ids must say which one a row is of"
            )
        if not tasks or task_ids is None:
            return input_ids.new_zeros(rows)
        if len(task_ids) != rows:
            raise UserError(f"task_ids are {len(task_ids)}, and there are {rows} rows; expected one for each")
        if task_ids.device.type == "cpu" and not 0 <= int(task_ids.min()) <= int(task_ids.max()) < len(tasks):
            raise UserError(
                f"task_ids are {task_ids.tolist()}; expected 0 to {len(tasks) - 1}, the numbers of {', '.join(tasks)}"
            )
        return task_ids

    def _reading(
        self,
        attention_mask: Tensor,
        prompts: Tensor,
        context_mask: Tensor | None = None,
        labels: Tensor | None = None,
        packed: PackedRows | None = None,
    ) -> AbstractContextManager[None]:
        """Have the method prepare for a batch; masks and labels are those without the prompt."""
        if packed:
            return self._prepared(packed.context(labels, context_mask), prompts, packed.example_ids)
        context = attention_mask.bool()
        if context_mask is not None:
            context = context & context_mask.bool()
        elif labels is not None and not self.is_encoder_decoder:
            context = context & (labels == IGNORE_INDEX).cumprod(1).bool()
        outside = context.new_zeros(1, self.num_virtual_tokens)
        return self._prepared(inserted(context, outside, attention_mask.argmax(1, keepdim=True)), prompts)

    def _prepared(
        self, context: Tensor, prompts: Tensor, example_ids: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Context in which the method's modules have what it makes for a batch, see `Method.for_batch`."""
        if self.method.batch is None or not self._enabled:
            return nullcontext()
        return self.method.batch.holding(self.method.for_batch(context, prompts, example_ids))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        task_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        adapter_names: Sequence[str | None] | None = None,
        example_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Run the backbone on prompt and tokens.

        Args:
            input_ids: Token ids [B, S], padded on either side.
            attention_mask: 1 for tokens, 0 for padding [B, S].
            labels: For causal models [B, S], aligned with `input_ids`; for encoder-decoder models the target ids
                [B, T]. `IGNORE_INDEX` where no loss is wanted.
            reduction: `mean` over the label tokens or their `sum`.
            label_smoothing: Share in [0, 1) of each label that is spread over the vocabulary, as in `F.cross_entropy`.
            task_ids: Number in `prompt_tasks` of each row's task [B]; needed if there are any, and else not looked at.
            context_mask: 1 for the tokens that what a method makes for a row may depend on [B, S]. If not given, in a
                causal model those before the first label, and elsewhere all.
            adapter_names: Of those of `load_adapters`, the one that each row is read with; None for none.
            example_ids: Rows are packed: which of its row's examples a position is of, from 1 on, and 0 behind the last
                [B, S]. Each example has room for its soft prompt in front, where `attention_mask` is 0, and `task_ids`
                [B, N] are those of the examples of each row. Causal models; see `adept_ds.data.encode.collate_packed`.
            **kwargs: Handed to the backbone.

        Returns:
            Without labels, the backbone's output; logits of a causal model cover the prompt too [B, l + S, V]. With
            labels, an output whose `loss` is an fp32 scalar and which has no logits: they exist at the labelled
            positions only, see `adept_ds.model.loss`. Logits of packed rows are those of `PackedRows`' form.

        Raises:
            UserError: With labels, a backbone that does to its logits what `trace_tail` does not see. Or `task_ids` are
                missing, are not one for each row, or are no numbers of tasks.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        _refuse_embeddings(kwargs)
        packed = None if example_ids is None else self._packed(input_ids, attention_mask, example_ids)
        prompts = self.row_prompts(input_ids, task_ids, adapter_names)
        if packed:
            prompts = packed.of_positions(prompts)
            ids = packed.with_prompts(self.vocabulary_size, prompts)
            kwargs |= packed.arguments() | ({} if labels is not None else {"use_cache": False})
        else:
            ids, kwargs["attention_mask"] = self.add_prompt(input_ids, attention_mask, prompts)
            if not self.is_encoder_decoder:
                # Models with absolute positions must not count left padding.
                kwargs.setdefault("position_ids", (kwargs["attention_mask"].cumsum(1) - 1).clamp(min=0))
        if labels is None:
            with self._reading(attention_mask, prompts, context_mask, packed=packed):
                return self.backbone(input_ids=ids, **kwargs)
        if packed:
            targets = packed.targets(labels)
        elif self.is_encoder_decoder:
            targets = labels
            kwargs["decoder_input_ids"] = decoder_inputs(self.backbone, labels)
        else:
            # Padding has no label, so this holds whichever side it is on.
            targets = shift_labels(F.pad(labels, (self.num_virtual_tokens, 0), value=IGNORE_INDEX))
        distillation = self.method.distillation if self.training and self._enabled else None
        teacher = None
        if distillation is not None:
            numbers = distillation.first_teacher + prompts
            if packed:
                theirs = packed.with_prompts(self.vocabulary_size, numbers)
            else:
                theirs, _ = self.add_prompt(input_ids, attention_mask, numbers)
            teacher = teacher_states(self.backbone, distillation, targets, input_ids=theirs, **kwargs)
        head = self.backbone.get_output_embeddings()
        states: AbstractContextManager[list[Tensor]] = last_hidden_states(self.backbone) if teacher else nullcontext([])
        with (
            self._reading(attention_mask, prompts, context_mask, labels, packed),
            head.summing(targets, teacher.soft_targets() if teacher else None, label_smoothing),
            states as hidden,
        ):
            output = self.backbone(input_ids=ids, use_cache=False, **kwargs)
            if not head.returned(output.logits):
                raise UserError(
                    f"model.name_or_path is {self.backbone.config.name_or_path!r}: {type(self.backbone).__name__} "
                    "does something to its logits behind the LM head that cannot be repeated in the loss; such models "
                    "cannot be trained here"
                )
        loss = output.logits.sum()
        if teacher:
            loss = loss + teacher.hidden_loss(hidden[0], targets)
        if reduction == "mean":
            loss = loss / (targets != IGNORE_INDEX).sum().clamp(min=1)
        return ModelOutput(loss=loss)

    @torch.no_grad()
    def extend(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompts: Tensor,
        cache: Cache,
        position_ids: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Any:
        """Let a causal backbone read ids behind those whose keys and values `cache` holds.

        Args:
            input_ids: What is read [B, S], with the ids of a prompt where one is to be read, and left padding.
            attention_mask: 1 for tokens, 0 for padding, of what is in the cache and what is read [B, C + S].
            prompts: Number of each row's prompt [B].
            cache: Is added to, or exchanged for the one that the output has.
            position_ids: Of what is read [B, S]; counted by the mask if not given.
            context: With a prompt that depends on its row, the mask of the row's own tokens, without the prompt.

        Returns:
            The backbone's output with `past_key_values`, and `logits` of at least the last position.
        """
        columns = input_ids.shape[1]
        if position_ids is None:
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -columns:]
        if "logits_to_keep" in inspect.signature(type(self.backbone).forward).parameters:
            last: dict[str, Any] = {"logits_to_keep": 1}
        else:
            last = {}
        nothing = torch.zeros_like(input_ids, dtype=torch.bool)
        reading = self._prepared(nothing, prompts) if context is None else self._reading(context, prompts)
        with reading:
            return self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                **last,
            )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """`transformers` generation on the adapted model; every generated token gets its offset too.

        Takes plain ids [B, S] (left-padded for causal models), `task_ids` and `adapter_names` as `forward`, and any
        argument of the backbone's `generate`; returns the sequences that it would: for causal models what was read and
        generated, without the prompt.

        Raises:
            UserError: `inputs_embeds` are given, which would be read in the ids' place, without prompt and offsets.
        """
        _refuse_embeddings(kwargs)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        prompts = self.row_prompts(input_ids, task_ids, adapter_names)
        ids, mask = self.add_prompt(input_ids, attention_mask, prompts)
        columns = 0 if self.is_encoder_decoder else self.num_virtual_tokens
        with prompt_hidden(self.backbone, self.vocabulary_size, columns), self._reading(attention_mask, prompts):
            output = self.backbone.generate(input_ids=ids, attention_mask=mask, **kwargs)
        if isinstance(output, Tensor):
            return plain_ids(output, self.vocabulary_size)
        output.sequences = plain_ids(output.sequences, self.vocabulary_size)
        return output

    def save_pretrained(self, folder: str | Path, **facts: Any) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` (fp32); `facts` go into the former. A method that
        trains the whole backbone writes a model folder; see `adept_ds.storage.model_folder`."""
        if self.method.config is None:
            raise UserError("the backbone as it is has no adapter to save")
        if self.method.config.saves_model:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.save_backbone(Path(folder), None, facts)
            return
        values = {name: parameter.detach().float().cpu() for name, parameter in self.trainable_parameters().items()}
        values |= self.method.constants()
        adapter_folder.save_adapter(folder, self.method.config, values, self.backbone_facts, facts)

    def push_to_hub(
        self, repository: str, private: bool | None = None, revision: str | None = None, **facts: Any
    ) -> str:
        """Upload what `save_pretrained` writes, and a model card, to a repository of the hub; return the commit's
        address.

        `adept-ds card --push` does it for the folder of a run, with the run's figures in the card.

        Args:
            repository: Its id on the hub; it is made if it is not there.
            private: Whether a new repository is for its owner alone; as the owner has set it if None.
            revision: Branch that the commit goes to.
            **facts: As `save_pretrained`.

        Raises:
            UserError: The hub refuses it, or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **facts)
            make_card(read_subject(Path(folder)), repository=repository).save(Path(folder) / README_NAME)
            return push_folder(Path(folder), repository, private, revision=revision)

    def save_backbone(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        facts: Mapping[str, Any],
        world: World | None = None,
    ) -> None:
        """Write the fully tuned backbone into an existing folder; see `model_folder.save_model`. Collective."""
        config = cast(FullConfig, self.method.config)
        size = int(config.max_file_gb * 1e9)
        model_folder.save_model(folder, self.backbone, tokenizer, config, self.backbone_facts, facts, size, world)

    @classmethod
    def from_pretrained(
        cls, backbone: PreTrainedModel, source: str | Path, revision: str | None = None, **changed: Any
    ) -> AdaptedModel:
        """Inject the method of a saved adapter into `backbone` and load its values: a model in evaluation mode.

        Args:
            backbone: The backbone it was trained on.
            source: The adapter folder, or the adapter's id on the hub.
            revision: Branch, tag or commit on the hub.
            **changed: Settings of the method to use in place of the saved ones, such as `offset_in_evaluation=False`.

        Raises:
            UserError: There is no whole adapter, or it is one for another backbone.
            pydantic.ValidationError: The method has no such setting.
        """
        adapter = adapter_folder.load_adapter(source, revision)
        adapter_folder.check_backbone(adapter, adapter_folder.backbone_facts(backbone))
        settings = type(adapter.method).model_validate(adapter.method.model_dump() | changed)
        model = cls(backbone, create_method(settings), seed=None)
        model.load_trained(adapter.tensors)
        return model.eval()

    def load_trained(self, values: Mapping[str, Tensor]) -> None:
        """As `load_values` of `adept_ds.methods.base`."""
        load_values(self.method, values)


def decoder_inputs(backbone: Any, labels: Tensor) -> Tensor:
    """What a decoder behind an encoder reads to predict labels [B, T]: the labels before each, behind a start."""
    if hasattr(backbone, "prepare_decoder_input_ids_from_labels"):
        ids: Tensor = backbone.prepare_decoder_input_ids_from_labels(labels=labels)
        return ids
    start, padding = backbone.config.decoder_start_token_id, backbone.config.pad_token_id or 0
    before = F.pad(labels[:, :-1], (1, 0), value=start)
    return before.masked_fill(before == IGNORE_INDEX, padding)


def _refuse_embeddings(given: Mapping[str, Any]) -> None:
    if given.get("inputs_embeds") is not None:
        raise UserError("inputs_embeds would be read without soft prompt and offsets; expected input_ids")


def get_adept_model(
    backbone: PreTrainedModel,
    config: MethodConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> AdaptedModel:
    """Inject the method that `config` describes into `backbone`, and start from the values of its `init_from`.

    Raises:
        UserError: As `AdaptedModel`; or the adapter of `init_from` is not whole, is of another method, of other sizes,
            or of another backbone.
    """
    model = AdaptedModel(backbone, create_method(config), tokenizer, seed)
    start_from_source(model, config)
    return model


def start_from_source(model: AdaptedModel, config: MethodConfig) -> None:
    """Give a model the values of its settings' `init_from`, if there is one; on the meta device this only checks them.

    Raises:
        UserError: As `get_adept_model`.
    """
    if isinstance(config, AdapterSettings) and config.init_from is not None:
        source = adapter_folder.load_adapter(config.init_from)
        adapter_folder.check_backbone(source, model.backbone_facts)
        if source.method.name != config.name:
            raise UserError(
                f"method.init_from is {config.init_from!r}, an adapter of method {source.method.name!r}; expected one "
                f"of method {config.name!r}"
            )
        model.load_trained(model.method.start_values(source))

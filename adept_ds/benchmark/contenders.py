"""The models that are measured side by side: ADePT, the bare backbone as the floor, HF PEFT's methods.

All hold the same frozen weights in memory once (a 4-bit backbone twice: in this project's layout and in bitsandbytes'),
and all take the same examples in the same batches, padded to the longest row unless their name says otherwise. The
optimizer is AdamW with the run's settings, the loss plain cross-entropy, whatever `train.label_smoothing` is.

    adept_ds             this project: its linear layers, LM head and loss at the labelled positions, ADePT
    adept_ds, packed     the same on the same examples in packed rows, where the run has `train.packing`
    backbone             the floor: the same without ADePT, ordinary tokens in the soft prompt's place, gradient down to
                         the embedded input, no optimizer
    adept_ds, dense      with model.quantization fp8: the same on weights in the model's precision
    backbone, stock      the floor as `transformers` has it: its linear layers and its loss over all positions
    adept_ds, not ...    with `train.compile`: this project without it; no other contender is compiled
    PEFT ...             `get_peft_model` on the stock backbone; LoRA with PEFT's defaults, prompts of ADePT's length

On ranks, where `adept_ds` is in DeepSpeed's engine, each with weights of its own (`ranks`):

    adept_ds, plain torch    without DeepSpeed: whole weights on every rank, each trains for itself
    adept_ds, by weight      ZeRO-3 as DeepSpeed does it (`train.gather` weight)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from adept_ds.backbone.load import DTYPES, load_backbone, random_backbone
from adept_ds.backbone.quantization import QuantizedLinear
from adept_ds.benchmark.work import Step, Work, padded_to, padded_tokens, with_prompt_positions
from adept_ds.config.run import ModelConfig, RunConfig, TrainConfig
from adept_ds.data.encode import longest_example
from adept_ds.errors import UserError
from adept_ds.methods import Untuned
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.training.optimizer import build_optimizer

OURS, PACKED, DENSE, UNCOMPILED = "adept_ds", "adept_ds, packed", "adept_ds, dense", "adept_ds, not compiled"
FLOOR, STOCK_FLOOR = "backbone", "backbone, stock"
PEFT_PROMPT, PEFT_LORA, PEFT_PADDED = "PEFT prompt tuning", "PEFT LoRA", "PEFT prompt tuning, padded to the maximum"

PLAIN, BY_WEIGHT = "adept_ds, plain torch", "adept_ds, by weight"

AGAINST = {
    "peft": (PEFT_PROMPT, PEFT_LORA),
    "peft-prompt-tuning": (PEFT_PROMPT,),
    "peft-lora": (PEFT_LORA,),
    "peft-padded": (PEFT_PADDED,),
}
"""Choice of `--against` to contenders of one process."""
AGAINST_ON_RANKS = {"plain": PLAIN, "by-weight": BY_WEIGHT}
"""Choice of `--against` to the contender of a launcher's ranks."""


@dataclass
class Contender:
    """A model in training on its own form of the common batches; `rounds` has the seconds by phase of each round."""

    name: str
    model: nn.Module
    backbone: Any
    """The `transformers` model in it."""
    optimizer: torch.optim.Optimizer | None
    steps: list[Step]
    num_virtual_tokens: int
    """Soft-prompt positions, or ordinary ones in their place."""
    padded_tokens: int
    """Positions computed in a round: tokens, padding, soft prompt."""
    rounds: list[dict[str, float]] = field(default_factory=list)
    cpu_rounds: list[float] = field(default_factory=list)
    """CPU seconds of this process in each round; on a GPU those of the host."""

    def forward_backward(self, number: int) -> Tensor:
        """Gradients of step `number`; returns its loss, the mean over its micro-batches."""
        step = self.steps[number]
        total = torch.zeros((), device=step[0]["input_ids"].device)
        for batch in step:
            loss = self.model(**batch).loss / len(step)
            loss.backward()
            total += loss.detach()
        return total

    def update(self) -> None:
        """Take the optimizer's step."""
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def round_seconds(self) -> list[float]:
        """Seconds of each round."""
        return [sum(phases.values()) for phases in self.rounds]

    @property
    def fetches(self) -> list[tuple[Any, str]]:
        """Objects and names of their methods that fetch weights which ZeRO-3 has split."""
        return []


class InputGradient(nn.Module):
    """An input embedding whose output wants a gradient, as that of a trained embedding does."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed ids [B, S] as a leaf [B, S, d] of the graph."""
        return self.table(input_ids).requires_grad_()


def build_contenders(
    run: RunConfig,
    architecture: PreTrainedConfig,
    work: Work,
    against: Sequence[str],
    random_init: bool,
    device: torch.device,
    with_stock: bool = True,
) -> list[Contender]:
    """Return ADePT, the floors and the chosen others, each in training mode with its batches on `device`.

    Args:
        run: Backbone, method, precision, optimizer.
        architecture: The backbone's shape.
        work: The common batches.
        against: Keys of `AGAINST`.
        random_init: Take random weights in place of a checkpoint's.
        device: Where all run.
        with_stock: Whether the floor is measured on the stock backbone too, on which others are measured in any case,
            and a compiled model without the compiler.

    Raises:
        UserError: The backbone cannot be loaded, or int8 or fp8 is to be compared, which PEFT's layers do not compute.
    """
    names = {name for choice in against for name in AGAINST.get(choice, ())}
    if names and run.model.quantization in ("int8", "fp8"):
        raise UserError(
            f"--against: model.quantization is {run.model.quantization!r}, and PEFT's layers compute otherwise in 8 "
            "bits, which is other work; expected nf4 or no quantisation"
        )
    own_backbone, stock_backbone = _backbones(run, architecture, random_init, device, with_stock or bool(names))

    def on_device(step: Step) -> Step:
        return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in step]

    steps = [on_device(step) for step in work.steps]
    length = run.method.num_virtual_tokens
    longer = [on_device(with_prompt_positions(step, length, work.encoder_decoder)) for step in work.steps]

    def contender(name: str, model: nn.Module, backbone: Any, batches: list[Step], prompt: int) -> Contender:
        model.train()
        padded = padded_tokens(batches, 0 if batches is longer else prompt, work.encoder_decoder)
        optimizer = _optimizer(model, run.train)
        return Contender(name, model, backbone, optimizer, batches, prompt, padded)

    ours = get_adept_model(sharing_weights(own_backbone), run.method, work.tokenizer, run.train.seed)
    floor = AdaptedModel(sharing_weights(own_backbone), Untuned())
    want_input_gradient(floor.backbone)
    contenders = [
        contender(OURS, ours, ours.backbone, steps, length),
        contender(FLOOR, floor, floor.backbone, longer, length),
    ]
    if work.packed_steps is not None:
        packed = get_adept_model(sharing_weights(own_backbone), run.method, work.tokenizer, run.train.seed)
        batches = [on_device(step) for step in work.packed_steps]
        contenders.append(contender(PACKED, packed, packed.backbone, batches, length))
    if run.model.quantization == "fp8" and with_stock:
        model = run.model.model_copy(update={"quantization": None})
        dense_run = run.model_copy(update={"model": model})
        dense_backbone, _ = _backbones(dense_run, architecture, random_init, device, with_stock=False)
        dense = get_adept_model(dense_backbone, run.method, work.tokenizer, run.train.seed)
        contenders.append(contender(DENSE, dense, dense.backbone, steps, length))
    if stock_backbone is not None and with_stock:
        stock = want_input_gradient(sharing_weights(stock_backbone))
        contenders.append(contender(STOCK_FLOOR, stock, stock, longer, length))
    if run.train.compile and with_stock:
        plain = get_adept_model(sharing_weights(own_backbone), run.method, work.tokenizer, run.train.seed)
        contenders.append(contender(UNCOMPILED, plain, plain.backbone, steps, length))
    positions, labels = longest_example(run.data, length, work.encoder_decoder)
    maximum = positions - length, labels if work.encoder_decoder else positions - length
    for name in (PEFT_PROMPT, PEFT_LORA, PEFT_PADDED):
        if name in names:
            peft = _peft_model(name, sharing_weights(stock_backbone), length)
            prompt = 0 if name == PEFT_LORA else length
            batches = [padded_to(step, *maximum) for step in steps] if name == PEFT_PADDED else steps
            contenders.append(contender(name, peft, peft.get_base_model(), batches, prompt))
    return contenders


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW | None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return None
    if isinstance(model, AdaptedModel):
        return build_optimizer(model, config)
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate.soft_prompt,
        betas=config.adam_betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )


def _backbones(
    run: RunConfig, architecture: PreTrainedConfig, random_init: bool, device: torch.device, with_stock: bool
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Return the backbone that our layers are put into and that of the stock contenders, the same if it is dense, and
    none unless they are wanted."""
    own = random_backbone(run.model, architecture, device) if random_init else load_backbone(run.model, device)
    stock: PreTrainedModel | None = own if with_stock else None
    if run.model.quantization and with_stock:
        stock = _bitsandbytes_backbone(run.model, architecture, random_init, device)
    for backbone in filter(None, (own, stock)):
        backbone.config.use_cache = False
        if run.train.activation_checkpointing:
            backbone.activation_checkpointing_enable({"use_reentrant": False})
    return own, stock


def _bitsandbytes_backbone(
    config: ModelConfig, architecture: PreTrainedConfig, random_init: bool, device: torch.device
) -> PreTrainedModel | None:
    """The stock backbone with bitsandbytes' own 4-bit layers; None for int8 and fp8."""
    if config.quantization != "nf4":
        return None
    dtype = DTYPES[config.dtype]
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": config.attn_implementation,
        "device_map": {"": device},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        ),
    }
    if random_init:
        dense = random_backbone(config.model_copy(update={"quantization": None}), architecture, device)
        backbone = type(dense).from_pretrained(None, config=dense.config, state_dict=dense.state_dict(), **options)
    else:
        auto: Any = AutoModelForSeq2SeqLM if architecture.is_encoder_decoder else AutoModelForCausalLM
        backbone = auto.from_pretrained(
            config.name_or_path, revision=config.revision, use_safetensors=True, trust_remote_code=False, **options
        )
    return backbone.requires_grad_(False)


def quantized_layers(backbone: nn.Module) -> int:
    """Number of linear layers on 4-bit weights, ours or bitsandbytes'."""
    return sum(isinstance(module, (QuantizedLinear, Linear4bit)) for module in backbone.modules())


def sharing_weights(backbone: Any) -> Any:
    """Return a copy of the backbone's modules that holds the very same parameters and buffers."""
    shared: list[Any] = [*backbone.parameters(), *backbone.buffers()]
    # bitsandbytes' layers refer to the scales of their weights too.
    shared += [parameter.quant_state for parameter in backbone.parameters() if isinstance(parameter, Params4bit)]
    return copy.deepcopy(backbone, {id(tensor): tensor for tensor in shared})


def want_input_gradient(backbone: Any) -> Any:
    """Make the backward pass go down to the embedded input, of the encoder where there is one; returns `backbone`."""
    reader = backbone.get_encoder() if backbone.config.is_encoder_decoder else backbone
    reader.set_input_embeddings(InputGradient(reader.get_input_embeddings()))
    return backbone


def _peft_model(name: str, backbone: Any, length: int) -> Any:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    task = "SEQ_2_SEQ_LM" if backbone.config.is_encoder_decoder else "CAUSAL_LM"
    if name == PEFT_LORA:
        return get_peft_model(backbone, LoraConfig(task_type=task))
    # One prompt, that of the encoder, where PEFT would make one for the decoder too.
    return get_peft_model(
        backbone, PromptTuningConfig(task_type=task, num_virtual_tokens=length, num_transformer_submodules=1)
    )

"""Loading the frozen backbone and its tokenizer, from a hub id or a local folder."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.integrations.hub_kernels import is_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.logging import disable_progress_bar

from adept_ds.backbone.fp8 import speed_note
from adept_ds.backbone.hub import CONFIG_NAME, cached_commit, is_local
from adept_ds.backbone.quantization import unquantized_note
from adept_ds.backbone.sharding import Partitioner
from adept_ds.backbone.streaming import fill_backbone, fill_randomly
from adept_ds.backbone.text_part import language_model, weight_transforms
from adept_ds.backbone.weight_files import check_weight_files, read_index
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError, did_you_mean, did_you_mean_path

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""`model.dtype` to the torch dtype."""

_zero_init: HfDeepSpeedConfig | None = None
"""`transformers` knows of ZeRO-3, and keeps ranks in step when it generates, while this lives (it has a weak
reference)."""


@contextmanager
def unsharded_creation() -> Iterator[None]:
    """Create models whole within the block, also where `transformers` knows of ZeRO-3 from an earlier backbone."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if _zero_init is not None:
            set_hf_deepspeed_config(_zero_init)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer; one without a padding token pads with its end token (padding is masked always).

    Raises:
        UserError: There is none at that place, or it cannot be reached.
    """
    source = config.tokenizer or config.name_or_path
    key = "model.tokenizer" if config.tokenizer else "model.name_or_path"
    revision = config.revision if config.tokenizer is None else None
    tokenizer = _from_source(AutoTokenizer, key, source, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_architecture(config: ModelConfig) -> PreTrainedConfig:
    """Return the backbone's `transformers` config: its shape, no weights.

    Raises:
        UserError: There is none at that place, it cannot be reached, it is that of no language model or of a quantised
            checkpoint, or it does not work as `config` says.
    """
    return trained_part(config, checkpoint_config(config))


def checkpoint_config(config: ModelConfig) -> PreTrainedConfig:
    """The checkpoint's own config, which may be that of a language model and a vision model together."""
    return _from_source(AutoConfig, "model.name_or_path", config.name_or_path, revision=config.revision)


def trained_part(config: ModelConfig, architecture: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the model that is trained.

    Raises:
        UserError: The checkpoint is quantised, or has no language model; or as `_check_settings`.
    """
    trained = language_model(architecture)
    quantized = getattr(architecture, "quantization_config", None) or getattr(trained, "quantization_config", None)
    if quantized:
        fields = quantized if isinstance(quantized, dict) else quantized.to_dict()
        raise UserError(
            f"model.name_or_path is {config.name_or_path!r}, whose weights are quantised already "
            f"({fields.get('quant_method', 'quantization_config')} in its config.json); expected the model in 16 or 32 "
            "bits that it was made of (to train on 4-bit or 8-bit weights, set model.quantization to 'nf4', 'int8' or "
            "'fp8')"
        )
    _check_settings(config, trained)
    return trained


def resolve_architecture(config: ModelConfig) -> tuple[PreTrainedConfig, str]:
    """Return the backbone's `transformers` config and where it is from.

    A local folder comes first, then the shapes that ship with the package, by the last part of the model's name, so
    that they serve for mirrors and for folders that are yet to be filled, then the hub.

    Raises:
        UserError: It is in none of the three, or it does not work as `config` says.
    """
    name = config.name_or_path
    shipped = resources.files("adept_ds.backbone") / "architectures" / f"{Path(name).name.lower()}.json"
    if Path(name).is_dir() or not shipped.is_file():
        return load_architecture(config), f"config of {name}"
    architecture = AutoConfig.for_model(**json.loads(shipped.read_text(encoding="utf-8")))
    return trained_part(config, architecture), "shape shipped with adept_ds"


def check_attention(config: ModelConfig, architecture: PreTrainedConfig) -> None:
    """Refuse an attention that the architecture does not have, or for which this machine lacks a package or a device.

    Kernels of the hub are those that `transformers` loads by itself: their repositories are named in full, and belong
    to publishers that it trusts.

    Raises:
        UserError: Names those that work here.
    """
    refusal = _attention_refusal(config, architecture)
    if refusal:
        others = (config.model_copy(update={"attn_implementation": name}) for name in _attentions())
        working = [str(other.attn_implementation) for other in others if not _attention_refusal(other, architecture)]
        raise UserError(
            f"model.attn_implementation is {config.attn_implementation!r}, which does not work here: {refusal}; "
            f"expected {' or '.join(working)}"
        )


def _attention_refusal(config: ModelConfig, architecture: PreTrainedConfig) -> str:
    """What `transformers` has against building the architecture with an attention; nothing if it builds it."""
    if config.attn_implementation is None:
        return ""
    auto, options = _auto_model(config, architecture)
    try:
        with torch.device("meta"):
            auto.from_config(copy.deepcopy(architecture), trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError) as error:
        return re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".")
    return ""


def _attentions() -> list[str]:
    """Names of attentions that models are trained with."""
    # Paged ones are for servers.
    return ["eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if not name.startswith("paged|"))]


def _check_settings(config: ModelConfig, architecture: PreTrainedConfig) -> None:
    """Refuse settings that the architecture does not work with on any machine.

    Raises:
        UserError: An attention that there is none of by that name, or an encoder-decoder model in fp16.
    """
    attention = config.attn_implementation
    if attention is not None and attention not in _attentions() and not is_kernel(attention):
        raise UserError(
            f"model.attn_implementation is {attention!r}; expected one of {', '.join(_attentions())}, or a kernel of "
            f"the hub (kernels-community/NAME){did_you_mean(attention, _attentions())}"
        )
    if config.dtype == "fp16" and architecture.is_encoder_decoder:
        raise UserError(
            f"model.dtype is 'fp16', in which the feed-forward layers of encoder-decoder models such as "
            f"{config.name_or_path!r} exceed the largest number (65,504) and give infinities; expected 'bf16' or 'fp32'"
        )


def load_backbone(
    config: ModelConfig,
    device: torch.device | None = None,
    deepspeed_config: dict[str, Any] | None = None,
    shard_group: dist.ProcessGroup | None = None,
    show_progress: bool = True,
) -> PreTrainedModel:
    """Load the backbone in `config.dtype`, frozen. Collective where there is a process group.

    Its attribute `hub_revision` is the commit that it was read from, None for a local folder: `transformers` does not
    keep it any more.

    Args:
        config: What to load.
        device: Where to; the CPU if None.
        deepspeed_config: The completed `deepspeed` section at stage 3, by which every parameter is split over the ranks
            as it is read; None loads the whole model into this process.
        shard_group: The ranks that the parameters are split over; all if None.
        show_progress: Whether this rank shows the progress of loading.

    Raises:
        UserError: There is no such checkpoint, it cannot be reached, or it is not one of this architecture; or as
            `check_attention`.
    """
    global _zero_init
    _zero_init = None  # or the skeleton below would be sharded, which is for an earlier backbone of this process
    if not show_progress:
        disable_progress_bar()
    device = device or torch.device("cpu")
    checkpoint = checkpoint_config(config)
    architecture = trained_part(config, checkpoint)
    check_attention(config, architecture)
    weights = weight_files(config)
    backbone = empty_backbone(config, architecture)
    if deepspeed_config is None and config.quantization is None:
        _keep_in_fp32(backbone, DTYPES[config.dtype])
    partitioner = Partitioner(deepspeed_config, backbone, device, shard_group) if deepspeed_config else None
    transforms = weight_transforms(backbone, checkpoint)
    unused = fill_backbone(backbone, config, weights, transforms, device, partitioner, show_progress)
    notes = [note for note in [unquantized_note(backbone)] if note]
    if config.quantization == "fp8":
        notes.append(speed_note(device, DTYPES[config.dtype]))
    if unused:
        notes.append(
            f"tensors of the checkpoint that {type(backbone).__name__} has no place for are left out: {len(unused)}, "
            f"the first is {unused[0]}"
        )
    for note in notes if show_progress else ():
        print(f"{config.name_or_path}: {note}", file=sys.stderr)
    backbone.generation_config = generation_config(config)
    backbone.hub_revision = cached_commit(config.name_or_path, config.revision)  # type: ignore[assignment]
    _zero_init = HfDeepSpeedConfig(deepspeed_config) if deepspeed_config else None
    return backbone.requires_grad_(False).eval()


def random_backbone(
    config: ModelConfig,
    architecture: PreTrainedConfig,
    device: torch.device,
    deepspeed_config: dict[str, Any] | None = None,
    shard_group: dist.ProcessGroup | None = None,
) -> PreTrainedModel:
    """As `load_backbone`, with random weights in place of a checkpoint's: for measurements of speed and memory.

    `config` gives precision, quantisation and attention, `architecture` the shape; the rest is as there.
    """
    global _zero_init
    _zero_init = None
    backbone = empty_backbone(config, architecture)
    partitioner = Partitioner(deepspeed_config, backbone, device, shard_group) if deepspeed_config else None
    fill_randomly(backbone, config, device, partitioner)
    return backbone.requires_grad_(False).eval()


def _auto_model(config: ModelConfig, architecture: PreTrainedConfig) -> tuple[Any, dict[str, Any]]:
    """The `transformers` class of the architecture and how its models are to be made."""
    auto: Any = AutoModelForSeq2SeqLM if architecture.is_encoder_decoder else AutoModelForCausalLM
    return auto, {"dtype": DTYPES[config.dtype], "attn_implementation": config.attn_implementation}


def empty_backbone(config: ModelConfig, architecture: PreTrainedConfig) -> PreTrainedModel:
    """The backbone with its parameters on the meta device."""
    auto, options = _auto_model(config, architecture)
    with init_empty_weights(include_buffers=False):
        backbone = auto.from_config(architecture, trust_remote_code=False, **options)
    backbone.tie_weights()
    return backbone


def generation_config(config: ModelConfig) -> GenerationConfig:
    """How a checkpoint generates; old ones such as BART's have that among the fields of their config.json."""
    options: dict[str, Any] = {"revision": config.revision or "main"}
    try:
        return GenerationConfig.from_pretrained(config.name_or_path, **options)
    except OSError:
        options |= {"config_file_name": CONFIG_NAME, "_from_model_config": True}
        return GenerationConfig.from_pretrained(config.name_or_path, **options)


def _keep_in_fp32(backbone: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make those weights and buffers fp32 that `transformers` keeps so, such as the biases of a router of experts.

    Not where ZeRO-3 splits the weights, which it wants in one precision, and not where they are quantised: an engine
    casts what is of another precision than the model's, and the bytes of quantised weights must not be cast.
    """
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in backbone._get_dtype_plan(dtype)]
    for name, tensor in backbone.state_dict(keep_vars=True).items():
        if any(pattern.search(name) for pattern in patterns):
            tensor.data = tensor.data.float()


def weight_files(config: ModelConfig) -> list[Path]:
    """The safetensors files of the checkpoint, fetched from the hub if need be.

    Raises:
        UserError: There are none at that place, they cannot be reached, or they are not whole.
    """
    paths = _weight_paths(config)
    check_weight_files(paths)
    return paths


def _weight_paths(config: ModelConfig) -> list[Path]:
    source = config.name_or_path
    with _told_as_user_error("model.name_or_path", source):
        options: dict[str, Any] = {"revision": config.revision}
        single = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **options)
        if single:
            return [Path(single)]
        index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)
        read_index(Path(str(index)))
        return [Path(path) for path in get_checkpoint_shard_files(source, index, **options)[0]]


def _from_source(auto: Any, key: str, source: str, **options: Any) -> Any:
    """Call `auto.from_pretrained`, turning what a user can mend into a `UserError`."""
    if is_local(source) and not Path(source).is_dir():
        raise UserError(f"{key} is {source!r}: no such folder{did_you_mean_path(source)}")
    with _told_as_user_error(key, source):
        return auto.from_pretrained(source, trust_remote_code=False, **options)


@contextmanager
def _told_as_user_error(key: str, source: str) -> Iterator[None]:
    """Tell what `transformers` raises about a checkpoint as the mistake that it nearly always is."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # Of files that hold something else than they should, it raises whatever comes of that.
        if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = "it brings code of its own, which is not run here; only what transformers has itself is"
        elif not isinstance(error, OSError | ValueError | ImportError):
            reason = " ".join(f"a file of it is not as it should be ({type(error).__name__}: {error})".split())[:300]
        raise UserError(
            f"{key} is {source!r}, which cannot be loaded: {reason} (expected: a local folder with a safetensors "
            "checkpoint, or a hub id that is in the local cache or reachable)"
        ) from error

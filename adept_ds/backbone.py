"""Loading the frozen backbone and its tokenizer, from a hub id or a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils.logging import disable_progress_bar

from adept_ds.config import ModelConfig
from adept_ds.errors import UserError, did_you_mean

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""`model.dtype` to the torch dtype."""

_zero_init: HfDeepSpeedConfig | None = None
"""transformers shards weights while it loads them for as long as this object lives (it keeps a weak reference)."""


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
        UserError: There is none at that place, or it cannot be reached.
    """
    return _from_source(AutoConfig, "model.name_or_path", config.name_or_path, revision=config.revision)


def load_backbone(
    config: ModelConfig, deepspeed_config: dict[str, Any] | None = None, show_progress: bool = True
) -> PreTrainedModel:
    """Load the backbone in `config.dtype`, frozen; sharded parameter by parameter if DeepSpeed is at ZeRO stage 3.

    Args:
        config: What to load.
        deepspeed_config: The completed `deepspeed` section; None loads the whole model into this process.
        show_progress: Whether this rank shows the progress of loading.

    Raises:
        UserError: There is no such checkpoint, or it cannot be reached.
    """
    global _zero_init
    if not show_progress:
        disable_progress_bar()
    architecture = load_architecture(config)
    _zero_init = HfDeepSpeedConfig(deepspeed_config) if deepspeed_config else None
    backbone = _from_source(
        AutoModelForSeq2SeqLM if architecture.is_encoder_decoder else AutoModelForCausalLM,
        "model.name_or_path",
        config.name_or_path,
        revision=config.revision,
        dtype=DTYPES[config.dtype],
        attn_implementation=config.attn_implementation,
        use_safetensors=True,
    )
    return backbone.requires_grad_(False)


def _from_source(auto: Any, key: str, source: str, **options: Any) -> Any:
    """Call `auto.from_pretrained`, turning what a user can mend into a `UserError`."""
    path = Path(source)
    is_local = path.is_dir() or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if is_local and not path.is_dir():
        siblings = [str(folder) for folder in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{key} is {source!r}: no such folder{did_you_mean(source, siblings)}")
    try:
        return auto.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{key} is {source!r}, which cannot be loaded: {reason} (expected: a local folder with a safetensors "
            "checkpoint, or a hub id that is in the local cache or reachable)"
        ) from error

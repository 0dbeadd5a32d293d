"""The language model within a model that reads images or sound as well, which is what is trained of it."""

from __future__ import annotations

import re

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform

from adept_ds.errors import UserError


def is_composite(architecture: PreTrainedConfig) -> bool:
    """Whether the config is one of several models of which one is a causal language model."""
    return "text_config" in architecture.sub_configs and not architecture.is_encoder_decoder


def language_model(architecture: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the language model: of a composite its part, else the config itself.

    Raises:
        UserError: `transformers` has no language model of this type.
    """
    text = architecture
    if is_composite(architecture):
        text = architecture.get_text_config()
        text.name_or_path = architecture.name_or_path
        # The head is the composite's, and so is its tie to the table.
        text.tie_word_embeddings = getattr(architecture, "tie_word_embeddings", text.tie_word_embeddings)
    auto = AutoModelForSeq2SeqLM if text.is_encoder_decoder else AutoModelForCausalLM
    sizes = [size for size in ("hidden_size", "vocab_size") if getattr(text, size, None) is None]
    if type(text) not in auto._model_mapping or sizes:
        part = f", whose text part {text.model_type!r}" if text is not architecture else ", which"
        is_known = type(text) in auto._model_mapping
        reason = f"has no {sizes[0]} in its config" if is_known else "transformers does not have as a language model"
        raise UserError(
            f"model.name_or_path is {architecture.name_or_path!r}, of model type {architecture.model_type!r}{part} "
            f"{reason}; expected a causal or an encoder-decoder language model, or a model with such a text part"
        )
    return text


def weight_transforms(backbone: PreTrainedModel, architecture: PreTrainedConfig) -> list[WeightTransform]:
    """Return the rules by which `transformers` renames and converts a checkpoint's tensors for `backbone`.

    Args:
        backbone: The language model.
        architecture: The checkpoint's own config, which may be a composite's.

    Raises:
        UserError: `transformers` cannot build the composite here, or does not build it around such a language model.
    """
    transforms = get_model_conversion_mapping(backbone)
    if not is_composite(architecture):
        return transforms
    where = f"model.name_or_path is {architecture.name_or_path!r}, of model type {architecture.model_type!r}"
    try:
        with torch.device("meta"):
            whole = AutoModelForMultimodalLM.from_config(architecture)
    except (ValueError, ImportError) as error:
        raise UserError(f"{where}, which cannot be built here: {str(error).strip().splitlines()[0]}") from error
    # The composite holds the language model itself, or the part of it below the head.
    parts = [("", backbone), *((name, part) for name, part in backbone.named_children())]
    places = [
        (path, own)
        for own, part in parts
        for path, module in whole.named_modules()
        if isinstance(part, PreTrainedModel) and type(module) is type(part)
    ]
    if not places:
        raise UserError(f"{where}, which is not built around a {type(backbone).__name__}; expected a language model")
    path, own = places[0]
    # First to the composite's own names, of which its old checkpoints have others; then those of its language model.
    renamings = [rule for rule in get_model_conversion_mapping(whole) if isinstance(rule, WeightRenaming)]
    renamings.append(WeightRenaming(rf"^{re.escape(path)}\.", own and f"{own}."))
    return [*renamings, *(rule for rule in transforms if isinstance(rule, WeightConverter))]

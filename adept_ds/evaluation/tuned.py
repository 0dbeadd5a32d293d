"""What a run left, loaded for evaluation: an adapter on its backbone, a fully tuned model, or the backbone alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from adept_ds.backbone.load import load_backbone, load_tokenizer
from adept_ds.config.loader import config_hash
from adept_ds.config.run import ModelConfig, RunConfig
from adept_ds.distributed import World
from adept_ds.methods import Untuned
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.storage.adapter_folder import load_adapter
from adept_ds.storage.model_folder import is_model_folder


def load_tuned(config: ModelConfig, result: Path | None, world: World) -> tuple[AdaptedModel, PreTrainedTokenizerBase]:
    """Return what a run left (its `best`, for example), whole on every rank, with its tokenizer. Collective.

    Args:
        config: The backbone of the run.
        result: An adapter folder, or a model folder, whose weights and tokenizer then take the backbone's place; None
            for the backbone alone.
        world: This rank.

    Raises:
        UserError: The adapter is damaged or belongs to another backbone, or a model cannot be loaded.
    """
    adapter = None
    if result and is_model_folder(result):
        config = config.model_copy(update={"name_or_path": str(result), "revision": None})
    elif result:
        adapter = load_adapter(result)  # A damaged adapter is told before the weights are loaded.
    tokenizer = load_tokenizer(config)
    backbone = load_backbone(config, world.device, show_progress=world.is_main)
    if adapter:
        return AdaptedModel.from_pretrained(backbone, adapter.folder), tokenizer
    return AdaptedModel(backbone, Untuned()), tokenizer


def request_facts(run: RunConfig, result: Path | None) -> dict[str, Any]:
    """What a summary says about what was to be evaluated; `result` as in `load_tuned`. No weights are loaded.

    Raises:
        UserError: The adapter is damaged.
    """
    is_adapter = result is not None and not is_model_folder(result)
    return {
        "adapter": str(result) if result else None,
        "adapter_sha256": load_adapter(result).facts["tensors_sha256"] if result and is_adapter else None,
        "config_sha256": config_hash(run),
    }


def tuned_facts(run: RunConfig, model: AdaptedModel, result: Path | None) -> dict[str, Any]:
    """What a summary says about the model that it is of; `model` and `result` as in `load_tuned`."""
    return {
        **request_facts(run, result),
        "method": model.method.config.model_dump(mode="json") if model.method.config else None,
        "backbone": model.backbone_facts,
    }

"""What a run left, loaded for evaluation: an adapter on its backbone, a fully tuned model, or the backbone alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from adept_ds.backbone.inference import gather_in_forward, held_bytes, load_split_backbone
from adept_ds.backbone.load import generation_config, load_architecture, load_backbone, load_tokenizer
from adept_ds.config.loader import config_hash
from adept_ds.config.run import DataConfig, ModelConfig, RunConfig
from adept_ds.data.encode import encode_prompts, task_number
from adept_ds.data.fit import check_prompts, fit_padding
from adept_ds.distributed import World, prepare_deepspeed
from adept_ds.evaluation.receipts import decoding_receipt
from adept_ds.formats import Example
from adept_ds.methods import Untuned
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.rank_environment import is_main_rank
from adept_ds.storage.adapter_folder import Adapter, load_adapter
from adept_ds.storage.model_folder import is_model_folder


@dataclass(frozen=True)
class Tuned:
    """What a run left, all but its weights."""

    config: ModelConfig
    """Where the backbone is."""
    adapter: Adapter | None
    """What is put into it; None for a fully tuned model, and for the backbone alone."""
    tokenizer: PreTrainedTokenizerBase
    architecture: PreTrainedConfig

    def check_prompts(self, examples: Sequence[Example], data: DataConfig, max_new_tokens: int) -> int:
        """Return how many prompts have to be cut, which is told.

        Raises:
            UserError: The backbone cannot read one of them, or go on from it by so many tokens; or one is of a task
                that the adapter has no parameters of.
        """
        method = self.adapter.method if self.adapter else None
        for example in examples:
            task_number(example, method.prompt_tasks if method else ())
        length = method.num_virtual_tokens if method else 0
        prompts = encode_prompts(examples, self.tokenizer, data, length, self.architecture.is_encoder_decoder)
        check_prompts(prompts, self.tokenizer, self.architecture, method, max_new_tokens)
        if (note := prompts.note(data)) and is_main_rank():
            print(note)
        return prompts.truncated

    @property
    def generation(self) -> GenerationConfig:
        """How the backbone generates by itself."""
        return generation_config(self.config)

    def load_backbone(self, world: World, run: RunConfig | None = None) -> PreTrainedModel:
        """Return the backbone, whole on every rank or as `run.eval.sharding` says. Collective. UserError as `load`."""
        if run is None or run.eval.sharding == "none":
            return load_backbone(self.config, world.device, show_progress=world.is_main)
        prepare_deepspeed(world)
        zero = run.deepspeed.get("zero_optimization", {})
        backbone = load_split_backbone(self.config, world.device, zero, world.is_main)
        if world.is_main:
            part, whole = held_bytes(backbone)
            print(
                f"eval.sharding zero3: each of {world.world_size} ranks holds {part / 1e9:.2f} GB of the weights, and "
                f"at most {whole / 1e9:.2f} GB of them whole while it computes",
                file=sys.stderr,
            )
        return backbone

    def load(self, world: World, run: RunConfig | None = None) -> AdaptedModel:
        """Return the model, its backbone as `load_backbone` loads it. Collective.

        Raises:
            UserError: The adapter belongs to another backbone, or the weights cannot be loaded.
        """
        backbone = self.load_backbone(world, run)
        if self.adapter:
            model = AdaptedModel.from_pretrained(backbone, self.adapter.folder)
        else:
            model = AdaptedModel(backbone, Untuned()).eval()
        gather_in_forward(model.backbone)
        return model


def open_tuned(config: ModelConfig, result: Path | None) -> Tuned:
    """Return what a run left (its `best`, for example), without loading weights.

    Args:
        config: The backbone of the run.
        result: An adapter folder, or a model folder, whose weights and tokenizer then take the backbone's place; None
            for the backbone alone.

    Raises:
        UserError: The adapter is damaged, or there is no such backbone.
    """
    adapter = load_adapter(result) if result and not is_model_folder(result) else None
    config = place_of_weights(config, result)
    tokenizer, architecture = load_tokenizer(config), load_architecture(config)
    if (note := fit_padding(tokenizer, architecture)) and is_main_rank():
        print(note)
    return Tuned(config, adapter, tokenizer, architecture)


def place_of_weights(config: ModelConfig, result: Path | None) -> ModelConfig:
    """Where a result's weights are, beside those of its adapter: with a fully tuned model, `result` itself."""
    if result and is_model_folder(result):
        return config.model_copy(update={"name_or_path": str(result), "revision": None})
    return config


def load_tuned(config: ModelConfig, result: Path | None, world: World) -> tuple[AdaptedModel, PreTrainedTokenizerBase]:
    """Return `open_tuned(config, result)` with its weights, and the tokenizer. Collective."""
    tuned = open_tuned(config, result)
    return tuned.load(world), tuned.tokenizer


def request_facts(run: RunConfig, result: Path | None) -> dict[str, Any]:
    """What a summary says about what was to be evaluated; `result` as in `open_tuned`. No weights are loaded.

    Raises:
        UserError: The adapter is damaged.
    """
    is_adapter = result is not None and not is_model_folder(result)
    return {
        "adapter": str(result) if result else None,
        "adapter_sha256": load_adapter(result).facts["tensors_sha256"] if result and is_adapter else None,
        "config_sha256": config_hash(run),
    }


def tuned_facts(
    run: RunConfig, tuned: Tuned, result: Path | None, backbone: Mapping[str, Any], engine: Mapping[str, str]
) -> dict[str, Any]:
    """What a summary says about the model that it is of.

    Args:
        run: All settings.
        tuned: What was decoded with.
        result: As in `open_tuned`.
        backbone: What an adapter says about the backbone.
        engine: Name and version of what has decoded.
    """
    return {
        **request_facts(run, result),
        "method": tuned.adapter.method.model_dump(mode="json") if tuned.adapter else None,
        "backbone": dict(backbone),
        **decoding_receipt(run, tuned.config, engine),
    }

"""A fully tuned model as a folder in the hub's format, which `from_pretrained` of `transformers` loads.

    config.json  generation_config.json  the tokenizer's files
    model-00001-of-0000N.safetensors     the weights in the precision of the run, tied ones once
    model.safetensors.index.json         which weight is in which file (a single file is model.safetensors, without it)
    training.json                        what the weights were trained from, and how

Weights have the names of the `transformers` model. They are gathered one by one, so no rank holds the whole model: rank
0 holds what goes into one file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from adept_ds.backbone.sharding import full_numel, gathered
from adept_ds.config.method import MethodConfig
from adept_ds.distributed import World, on_main_rank
from adept_ds.files import usual_mode, write_json
from adept_ds.storage.hub_json import make_readable, readable_config, readable_tokenizer_config

TRAINING_NAME = "training.json"


def is_model_folder(folder: Path) -> bool:
    """Whether `folder` holds a whole model and not an adapter."""
    return (folder / CONFIG_NAME).is_file()


def save_model(
    folder: Path,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    method: MethodConfig,
    trained_from: Mapping[str, Any],
    facts: Mapping[str, Any],
    max_file_bytes: int,
    world: World | None = None,
) -> None:
    """Write `backbone` as a model folder. Collective where there is a `world`; rank 0 writes.

    Args:
        folder: An existing folder.
        backbone: The model, its weights whole or sharded by ZeRO-3.
        tokenizer: Saved beside it.
        method: How it was trained.
        trained_from: The backbone that the training started from.
        facts: Further facts for `training.json`.
        max_file_bytes: Size that a file stays below, unless one weight alone is larger.
        world: This rank; None outside a process group.
    """
    on_writer: Callable[[Callable[[], None]], None] = partial(on_main_rank, world=world) if world else _call
    is_writer = world is None or world.is_main
    tensors = _weights_once(backbone)
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: full_numel(tensor) * tensor.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )
    for name, members in tqdm(plan.filename_to_tensors.items(), desc="save", unit="file", disable=not is_writer):
        held: dict[str, Tensor] = {}
        for member in members:
            with gathered([tensors[member]]):
                if is_writer:
                    held[member] = tensors[member].detach().to("cpu", copy=True).contiguous()
        on_writer(partial(_write_file, folder / name, held))

    def write_rest() -> None:
        config = copy.deepcopy(backbone.config)
        config.dtype = str(backbone.dtype).removeprefix("torch.")
        config.architectures = [type(backbone).__name__]
        config.save_pretrained(folder)
        make_readable(folder / CONFIG_NAME, readable_config)
        if backbone.can_generate():
            # `save_pretrained` of it refuses contradictions that published models have.
            backbone.generation_config.to_json_file(folder / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            if (folder / "tokenizer.json").is_file():
                names = list(tokenizer.model_input_names)
                make_readable(folder / TOKENIZER_CONFIG_FILE, partial(readable_tokenizer_config, input_names=names))
        if plan.is_sharded:
            write_json(
                folder / SAFE_WEIGHTS_INDEX_NAME,
                {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))},
            )
        training = {
            "method": method.model_dump(mode="json"),
            "backbone": dict(trained_from),
            "versions": {name: version(name) for name in ("adept_ds", "torch", "transformers", "deepspeed")},
            **facts,
        }
        write_json(folder / TRAINING_NAME, training)

    on_writer(write_rest)


def _weights_once(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones under their first name."""
    seen: set[int] = set()
    once = {}
    for name, tensor in backbone.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            once[name] = tensor
    return once


def _write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(usual_mode())


def _call(function: Callable[[], None]) -> None:
    function()

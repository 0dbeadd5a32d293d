"""Adapters in HF PEFT's own format, both ways, for the methods that are PEFT's modules.

    pt, p_tuning    prompt_embeddings [l, d]           what the soft prompt's vectors are
    prefix          prompt_embeddings [l, 2 n w]       keys and values of n layers of width w
    lora, ia3       base_model.model.LAYER.KEY         as here, behind PEFT's prefix

PEFT keeps what an encoder made of a prompt and not the encoder, so `p_tuning` comes back as `pt`, and a prefix without
its projection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from adept_ds.backbone.table import OpenTable
from adept_ds.config.method import (
    Ia3Config,
    LoraConfig,
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
)
from adept_ds.errors import UserError
from adept_ds.export.checkpoint import Made, write_tensors
from adept_ds.export.token_table import loaded_method
from adept_ds.files import read_json
from adept_ds.methods import create_method
from adept_ds.methods.peft_layers import PeftLayers
from adept_ds.methods.prefix import PrefixTuning
from adept_ds.methods.prompted import PromptedMethod
from adept_ds.storage.adapter_folder import CONFIG_NAME, TENSORS_NAME, Adapter, check_finite, check_tensors

PICKLE_NAME = "adapter_model.bin"
PROMPT = "prompt_embeddings"
_PREFIX = "base_model.model."


@torch.no_grad()
def write_peft_folder(folder: Path, adapter: Adapter, opened: OpenTable, base: str) -> dict[str, str | None]:
    """Write the adapter in PEFT's format into an existing folder; return the name and sha256 of its tensors.

    Args:
        folder: Where to.
        adapter: Of a method that is PEFT's.
        opened: Its backbone's table.
        base: Hub id or folder of the backbone.
    """
    backbone = opened.backbone
    is_encoder_decoder = backbone.config.is_encoder_decoder
    if isinstance(adapter.method, LoraConfig | Ia3Config):
        layers = cast(PeftLayers, create_method(adapter.method))
        config, tensors = layers.peft_config(backbone), {f"{_PREFIX}{k}": v for k, v in adapter.tensors.items()}
    else:
        config, prompt = _prompt(adapter, opened)
        tensors = {PROMPT: prompt}
    config.base_model_name_or_path, config.inference_mode = base, True
    config.task_type = peft.TaskType.SEQ_2_SEQ_LM if is_encoder_decoder else peft.TaskType.CAUSAL_LM
    config.save_pretrained(str(folder))
    made = {name: Made("F32", tensor.shape, _given(tensor)) for name, tensor in tensors.items()}
    return {TENSORS_NAME: write_tensors(folder / TENSORS_NAME, made)}


def _given(tensor: Tensor) -> Any:
    return lambda: [tensor]


def _prompt(adapter: Adapter, opened: OpenTable) -> tuple[peft.PeftConfig, Tensor]:
    """PEFT's settings of a prompt or a prefix, and its vectors."""
    method = loaded_method(adapter, opened)
    if isinstance(method, PrefixTuning):
        settings, prefix = method.peft_config, method.encoder(torch.arange(method.config.prefix_length)[None])
        settings.prefix_projection = False
        return settings, prefix[0].float()
    assert isinstance(method, PromptedMethod)
    embedding = method.embedding.eval()
    length, width = method.num_virtual_tokens, embedding.embedding_dim
    vectors = embedding(embedding.num_embeddings + torch.arange(length)).float()
    sizes = {"num_virtual_tokens": length, "token_dim": width, "num_transformer_submodules": 1}
    if isinstance(adapter.method, PTuningConfig):
        kind = adapter.method.reparameterization.upper()
        hidden = adapter.method.hidden_size or width
        return peft.PromptEncoderConfig(
            **sizes, encoder_reparameterization_type=kind, encoder_hidden_size=hidden
        ), vectors
    return peft.PromptTuningConfig(**sizes), vectors


def is_peft_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter of a type that PEFT itself has."""
    path = folder / CONFIG_NAME
    return path.is_file() and read_json(path).get("peft_type") in {kind.value for kind in peft.PeftType}


def read_peft_folder(folder: Path, backbone: PreTrainedModel) -> tuple[MethodConfig, dict[str, Tensor]]:
    """Return an adapter of PEFT's as settings and tensors of a method here.

    Args:
        folder: What PEFT's `save_pretrained` wrote.
        backbone: Its backbone; its weights are not needed, and it is changed.

    Raises:
        UserError: A file is missing or damaged, or the adapter is of a kind that is none here.
    """
    fields = read_json(folder / CONFIG_NAME)
    kind = fields["peft_type"]
    tensors = _tensors(folder)
    method: MethodConfig
    if kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"):
        if tensors.keys() != {PROMPT}:
            raise UserError(f"{folder} has the tensors {', '.join(sorted(tensors))}; expected {PROMPT} alone")
        length = tensors[PROMPT].shape[0]
        if kind == "PREFIX_TUNING":
            method = PrefixTuningConfig(prefix_length=length)
            tensors = {"prefix_encoder.embedding.weight": tensors[PROMPT]}
        else:
            method = PromptTuningConfig(num_virtual_tokens=length)
            tensors = {"soft_prompt": tensors[PROMPT]}
    elif kind in ("LORA", "IA3"):
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
        method = _layers_method(folder, fields, tensors)
    else:
        raise UserError(
            f"{folder} is an adapter of PEFT's type {kind!r}, which is no method here; expected PROMPT_TUNING, "
            "P_TUNING, PREFIX_TUNING, LORA or IA3"
        )
    made = create_method(method)
    made.inject(backbone, None, None)
    shapes = {name: tuple(value.shape) for name, value in {**made.trained_parameters(), **made.constants()}.items()}
    check_tensors(tensors, shapes)
    check_finite(tensors, folder)
    return method, tensors


_UNSUPPORTED: dict[str, Any] = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
    "trainable_token_indices": None,
    "target_parameters": None,
    "exclude_modules": None,
}
"""Fields of PEFT's that change what an adapter computes, with the value that is the same here."""


def _layers_method(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MethodConfig:
    for name, value in _UNSUPPORTED.items():
        if fields.get(name) not in (None, value):
            raise UserError(
                f"{folder / CONFIG_NAME}: {name} is {fields[name]!r}, which no method here has; expected {value!r}"
            )
    if any("embedding" in name for name in tensors):
        raise UserError(f"{folder} has a LoRA on an embedding, which method lora has not; expected linear layers")
    layers = sorted({name.split(".lora_")[0].removesuffix(".ia3_l") for name in tensors})
    given = fields.get("target_modules")
    # PEFT takes a pattern too; the tensors say which layers it has met.
    ends = tuple(sorted(given)) if isinstance(given, list) else tuple(sorted({_end(layer) for layer in layers}))
    if fields["peft_type"] == "LORA":
        return LoraConfig(
            rank=fields["r"], alpha=fields["lora_alpha"], dropout=fields.get("lora_dropout", 0.0), target_modules=ends
        )
    feed_forward = set(fields.get("feedforward_modules") or ())
    return Ia3Config(
        feed_forward=bool(feed_forward), target_modules=tuple(end for end in ends if end not in feed_forward)
    )


def _end(layer: str) -> str:
    return layer.rpartition(".")[2]


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS_NAME
    try:
        if path.is_file():
            return {name: tensor.float() for name, tensor in load_file(path).items()}
        if (folder / PICKLE_NAME).is_file():
            loaded = torch.load(folder / PICKLE_NAME, map_location="cpu", weights_only=True)
            return {name: tensor.float() for name, tensor in loaded.items()}
    except (SafetensorError, RuntimeError, EOFError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the tensors of {folder} are damaged, or more than tensors: {reason}") from error
    raise UserError(f"{folder} is no adapter of PEFT's: it has no {TENSORS_NAME}")

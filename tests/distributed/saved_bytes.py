"""Bytes that a token leaves for the backward pass in one layer under ZeRO-3: `saved_bytes.py ONE_LAYER THREE_LAYERS`.

The difference between two depths leaves embedding and loss out. Prints a JSON object: variant to bytes.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from unittest import mock

import torch
from transformers import AutoModelForCausalLM

from adept_ds.backbone.load import load_backbone
from adept_ds.config.method import AdeptConfig
from adept_ds.config.run import ModelConfig
from adept_ds.distributed import init_world, prepare_deepspeed
from adept_ds.model import adapted_model
from adept_ds.training.engine import Engine

TOKENS = 64
DEEPSPEED = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


class SavedBytes:
    """Counts the storages that are saved in the block and are no weight's.

    What is a weight is asked when it is saved: later ZeRO-3 has taken its values away again. (Norms do keep theirs, a
    few KB a layer however many tokens there are.)
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.storages: dict[int, torch.UntypedStorage] = {}

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        if storage.data_ptr() not in weights:
            self.storages[storage.data_ptr()] = storage
        return tensor

    def hooks(self) -> AbstractContextManager[None]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def plain(path: str) -> int:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False).train()
    embeddings = torch.randn(1, TOKENS, model.config.hidden_size, requires_grad=True)
    saved = SavedBytes(model)
    with saved.hooks():
        hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    del hidden
    return saved.total()


def sharded(path: str, quantization: str | None, checkpointing: bool, own_linears: bool) -> int:
    world = init_world()
    prepare_deepspeed(world)
    settings = ModelConfig.model_validate({"name_or_path": path, "dtype": "fp32", "quantization": quantization})
    backbone = load_backbone(settings, world.device, deepspeed_config=DEEPSPEED, show_progress=False)
    replace = adapted_model.replace_frozen_linears if own_linears else lambda model: 0
    with mock.patch.object(adapted_model, "replace_frozen_linears", replace):
        model = adapted_model.get_adept_model(backbone, AdeptConfig(num_virtual_tokens=0))
    if checkpointing:
        model.checkpoint_activations()
    model.train()
    engine = Engine(model, torch.optim.AdamW(model.trainable_parameters().values()), DEEPSPEED, world)
    ids = torch.arange(TOKENS)[None]
    saved = SavedBytes(model)
    with saved.hooks():
        loss = engine.deepspeed(input_ids=ids, labels=ids, reduction="sum").loss
    del loss
    return saved.total()


def main(one: str, three: str) -> None:
    variants = {
        "plain": plain,
        "deepspeed's linear": lambda path: sharded(path, None, False, False),
        "ours": lambda path: sharded(path, None, False, True),
        "ours, nf4": lambda path: sharded(path, "nf4", False, True),
        "ours, checkpointed": lambda path: sharded(path, None, True, True),
        "ours, nf4, checkpointed": lambda path: sharded(path, "nf4", True, True),
    }
    found = {name: (measure(three) - measure(one)) / 2 / TOKENS for name, measure in variants.items()}
    if init_world().is_main:
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

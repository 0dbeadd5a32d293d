"""Load checkpoints in shards, as one rank, and print those that differ from themselves loaded whole:
`load_families_rank.py FOLDER..`."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from adept_ds.backbone.load import load_backbone
from adept_ds.backbone.sharding import gathered
from adept_ds.config.run import ModelConfig
from adept_ds.distributed import init_world, prepare_deepspeed


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(4, 24).view(2, 10)
    inputs = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def main(*folders: str) -> None:
    world = init_world()
    prepare_deepspeed(world)
    config = {
        "train_batch_size": world.world_size,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    for folder in folders:
        for quantization in (None, "nf4"):
            settings = {"name_or_path": folder, "dtype": "fp32", "quantization": quantization}
            model = ModelConfig.model_validate(settings)
            whole = load_backbone(model, show_progress=False)
            sharded = load_backbone(model, world.device, deepspeed_config=config, show_progress=False)
            halved = all(p.numel() == 0 and 2 * p.ds_tensor.numel() >= p.ds_numel for p in sharded.parameters())
            with gathered(sharded.parameters()):
                state, expected = sharded.state_dict(), whole.state_dict()
                # As bytes: the codes of quantised weights, read as numbers, may be none.
                different = [key for key in expected if not torch.equal(as_bytes(state[key]), as_bytes(expected[key]))]
                equal = torch.equal(logits(sharded), logits(whole))
            print(json.dumps([folder, quantization, halved, different, equal]))
            dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])

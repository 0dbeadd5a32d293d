"""Trains small backbones with frozen weights gathered by layer and by weight, and writes what came of both as JSON.

torchrun tests/distributed/layer_gathers_rank.py FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, PreTrainedConfig

from adept_ds.config.deepspeed import complete
from adept_ds.config.run import RunConfig
from adept_ds.distributed import World, init_world
from adept_ds.training.engine import Engine, build_engine
from tests.models import BACKBONES, seeded

ADEPT, LORA = {"num_virtual_tokens": 3, "bottleneck": 2}, {"name": "lora", "rank": 2, "dropout": 0.0}
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama, lora, checkpointed and offloaded": ("llama", LORA, True),
    "t5, adept": ("t5-tied", ADEPT, False),
    "t5, lora, checkpointed and offloaded": ("t5-tied", LORA, True),
    "mixtral, adept, checkpointed and offloaded": ("mixtral", ADEPT, True),
}
"""Backbone, method, and whether activations are recomputed and weights lie in the host's memory."""
MIXTRAL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
MIXTRAL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}


def engine_of(case: str, gather: str, world: World) -> Engine:
    """An engine on a backbone with random weights, the same for both ways."""
    backbone, method, is_tight = CASES[case]
    shape: PreTrainedConfig = MixtralConfig(**MIXTRAL) if backbone == "mixtral" else seeded(BACKBONES[backbone]).config
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    train = {"max_steps": 9, "warmup_steps": 1, "global_batch_size": world.world_size, "gather": gather}
    run = RunConfig.model_validate(
        {
            "model": {"name_or_path": "x", "dtype": "fp32"},
            "method": method,
            "train": train | {"activation_checkpointing": is_tight},
            "deepspeed": {"zero_optimization": zero | ({"offload_param": {"device": "cpu"}} if is_tight else {})},
        }
    )
    return build_engine(run, complete(run, world.world_size).config, None, world, random_shape=shape)


def results(engine: Engine, world: World) -> dict[str, Any]:
    """Losses of training and validation in turns, and greedy tokens, of which rank 1 makes more."""
    generator, losses = torch.Generator().manual_seed(world.rank), []
    engine.model.train()
    for number in range(4):
        ids = torch.randint(5, 90, (2, 9), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        torch.manual_seed(number)  # of T5's dropout
        losses.append(float(engine.forward_backward([batch] * (1 + number % 2), 36.0)))
        engine.step()
        losses.append(float(engine.evaluation_loss(batch)))
    engine.model.eval()
    tokens = engine.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4 + world.rank, synced_gpus=True
    )
    return {"losses": losses, "tokens": tokens.tolist(), "layers": len(engine.layers) if engine.layers else 0}


def main(out: Path) -> None:
    """Write both ways' results of every case."""
    world = init_world()
    found = {
        case: {gather: results(engine_of(case, gather, world), world) for gather in ("weight", "layer")}
        for case in CASES
    }
    if world.is_main:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Load a backbone in shards, as one rank, and print the bytes it took: `load_rank.py MODEL QUANTIZATION WARM_UP`."""

from __future__ import annotations

import gc
import json
import sys
import threading
from pathlib import Path

from transformers import PreTrainedModel

from adept_ds.backbone.load import load_backbone
from adept_ds.config.run import ModelConfig
from adept_ds.distributed import init_world, prepare_deepspeed


def own_memory() -> int:
    """Memory of this process alone: mapped files are the page cache's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Looks at the memory every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.stop = 0, threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.005):
            self.peak = max(self.peak, own_memory())


def main(model: str, quantization: str, warm_up: str) -> None:
    world = init_world()
    prepare_deepspeed(world)
    config = {
        "train_batch_size": world.world_size,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }

    def load(name: str) -> PreTrainedModel:
        settings = {"name_or_path": name, "quantization": None if quantization == "none" else quantization}
        return load_backbone(
            ModelConfig.model_validate(settings), world.device, deepspeed_config=config, show_progress=False
        )

    # What the libraries set up at first use is none of the load's.
    load(warm_up)
    gc.collect()
    before = own_memory()
    watch = Peak()
    watch.start()
    backbone = load(model)
    watch.stop.set()
    watch.join()
    parameters = list(backbone.parameters())
    print(
        json.dumps(
            {
                "rank": world.rank,
                "dense": sum(2 * getattr(parameter, "dense_numel", parameter.ds_numel) for parameter in parameters),
                "whole": sum(parameter.ds_numel * parameter.element_size() for parameter in parameters),
                "own": sum(parameter.ds_tensor.nbytes for parameter in parameters),
                "largest": max(parameter.ds_numel * parameter.element_size() for parameter in parameters),
                "steady": own_memory() - before,
                "peak": watch.peak - before,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

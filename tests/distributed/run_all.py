"""Train one run after another in one process group: `deepspeed tests/distributed/run_all.py --config RUNS.json`.

A start of the launcher takes longer than a run of a tiny model, so tests that compare many runs share one. A run whose
settings have `resume`, which is no setting, starts from that checkpoint.

With ADEPT_DS_TEST_FP16 set, DeepSpeed is told that this CPU computes in fp16, which torch does and DeepSpeed does not
try. With ADEPT_DS_TEST_NAN_MEMORY set, memory that nothing has been written to is full of NaN.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from adept_ds.config.run import RunConfig
from adept_ds.training.recipe import train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--local_rank", type=int)
    if os.environ.get("ADEPT_DS_TEST_FP16"):
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        CPU_Accelerator.is_fp16_supported = lambda self: True
    if os.environ.get("ADEPT_DS_TEST_NAN_MEMORY"):
        torch.use_deterministic_algorithms(True, warn_only=True)
    for settings in json.loads(parser.parse_args().config.read_text()):
        resume = settings.pop("resume", "auto")
        train(RunConfig.model_validate(settings), resume)


if __name__ == "__main__":
    main()

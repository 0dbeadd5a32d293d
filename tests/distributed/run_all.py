"""Train one run after another in one process group: `deepspeed tests/distributed/run_all.py RUNS.json`.

A start of the launcher takes longer than a run of a tiny model, so tests that compare many runs share one. With
ADEPT_DS_TEST_FP16 set, DeepSpeed is told that this CPU computes in fp16, which torch does and DeepSpeed does not try.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from adept_ds.config import RunConfig
from adept_ds.train import train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--local_rank", type=int)
    if os.environ.get("ADEPT_DS_TEST_FP16"):
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        CPU_Accelerator.is_fp16_supported = lambda self: True
    for settings in json.loads(parser.parse_args().runs.read_text()):
        train(RunConfig.model_validate(settings), resume="auto")


if __name__ == "__main__":
    main()

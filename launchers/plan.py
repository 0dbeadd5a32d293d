"""Predict whether a run fits, without weights, as `adept-ds plan` does.

    python launchers/plan.py --config ds_configs/llama3_8b.json --gpus 8 --gpu-memory 80GB

Everything is in `adept_ds.cli.plan`.
"""

from adept_ds.cli.plan import main
from adept_ds.entry_point import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)

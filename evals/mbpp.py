"""Evaluate on MBPP or HumanEval, or score samples, as `adept-ds eval` does.

    deepspeed evals/mbpp.py --config ds_configs/llama3_8b.json --adapter runs/llama3_8b/best --out results/adept

Everything is in `adept_ds.cli.mbpp`.
"""

from adept_ds.cli.mbpp import main
from adept_ds.entry_point import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)

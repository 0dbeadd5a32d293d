"""Evaluate on text-to-text tasks, as `adept-ds text2text` does.

    deepspeed evals/text2text.py --config ds_configs/t5_base.json --adapter runs/t5_base/best --out results/adept

Everything is in `adept_ds.cli.text2text`.
"""

from adept_ds.cli.text2text import main
from adept_ds.entry_point import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)

"""Fine-tune a language model with ADePT under DeepSpeed, as `adept-ds train` does.

    deepspeed launchers/train.py --config ds_configs/llama3_8b.json

Everything is in `adept_ds.cli.train`.
"""

from adept_ds.cli.train import main
from adept_ds.entry_point import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)

"""Measure speed and memory of training steps, as `adept-ds throughput` does.

    python evals/throughput.py --config ds_configs/smollm2_135m.json --against peft

Everything is in `adept_ds.cli.throughput`.
"""

from adept_ds.cli.throughput import main
from adept_ds.entry_point import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)

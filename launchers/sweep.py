"""Run a grid of settings and pick the best by validation, as `adept-ds sweep` does.

    python launchers/sweep.py --config ds_configs/t5_base.json --grid 'train.seed=[1, 2, 3]'

Everything is in `adept_ds.cli.sweep`.
"""

from adept_ds.cli.sweep import main
from adept_ds.entry_point import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)

"""Submit runs to SLURM, as `adept-ds submit` does.

    python launchers/submit.py train --config ds_configs/llama3_8b.json --gpus-per-node 4

Everything is in `adept_ds.cli.submit`.
"""

from adept_ds.cli.submit import main
from adept_ds.entry_point import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)

"""Make the paper's analyses of trained adapters, as `adept-ds analyse` does.

    python evals/analysis.py sizes --config ds_configs/t5_base.json --adapter runs/rte/best

Everything is in `adept_ds.cli.analysis`.
"""

from adept_ds.cli.analysis import main
from adept_ds.entry_point import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)

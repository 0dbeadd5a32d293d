"""Compare two evaluations of the same problems, as `adept-ds compare` does.

    python evals/compare.py results/base results/adept

Everything is in `adept_ds.cli.compare`.
"""

from adept_ds.cli.compare import main
from adept_ds.entry_point import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)

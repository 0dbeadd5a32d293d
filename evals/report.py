"""Report on one run, or on many in tables, as `adept-ds report` does.

    python evals/report.py runs/llama3_8b

Everything is in `adept_ds.cli.report`.
"""

from adept_ds.cli.report import main
from adept_ds.entry_point import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)

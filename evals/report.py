"""Report on finished or running runs: picture, HTML page, table.

    python evals/report.py runs/demo

Reads a run folder (see `adept_ds.report`), writes `learning_curve.png` and `report.html` into it and prints the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from adept_ds.entry_point import run_entry_point
from adept_ds.report import read_run, text_report, write_report


def main(arguments: Sequence[str]) -> None:
    """Report on each run folder in `arguments`."""
    parser = argparse.ArgumentParser(description="Write learning_curve.png and report.html for run folders.")
    parser.add_argument("run_dir", nargs="+", type=Path, help="run folder, for example runs/demo")
    for run_dir in parser.parse_args(arguments).run_dir:
        run = read_run(run_dir)
        page = write_report(run)
        print(text_report(run))
        print(f"  page: {page}")


if __name__ == "__main__":
    run_entry_point(main)

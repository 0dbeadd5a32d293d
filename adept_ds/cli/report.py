"""Report on finished or running runs: a page for one of them, tables in the paper's layout for many.

    adept-ds report runs/demo
    adept-ds report runs/rte_* runs/my_sweep --out report

For one run folder, writes `learning_curve.png` and `report.html` into it and prints the figures. For several, for a
folder of run folders (a sweep's), or with --out, compares their evaluations: mean and standard deviation over seeds,
intervals, and the paper's figures beside them, in report.md, report.csv and report.html with learning curves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from adept_ds.config.command_line import parse_flags
from adept_ds.reports.run_report import make_report, text_report, write_report
from adept_ds.storage.run_folder import CONFIG_NAME


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All arguments."""
    parser.add_argument("run_dir", nargs="+", type=Path, help="run folder, for example runs/demo; or a folder of them")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where tables go (default for several runs: report)")


def main(arguments: Sequence[str]) -> None:
    """Report on the run folders in `arguments`."""
    flags = parse_flags(arguments, "adept-ds report", __doc__ or "", add_flags)
    first, *others = flags.run_dir
    is_folder_of_runs = not (first / CONFIG_NAME).is_file() and any(first.glob(f"*/{CONFIG_NAME}"))
    if others or flags.out or is_folder_of_runs:
        report_tables(flags.run_dir, flags.out or Path("report"))
        return
    report = make_report(first)
    page = write_report(report)
    print(text_report(report))
    print(f"  page: {page}")


def report_tables(run_dirs: Sequence[Path], out: Path) -> None:
    """Compare many runs."""
    from adept_ds.reports.paper import paper_figures
    from adept_ds.reports.runs import read_runs, run_figures
    from adept_ds.reports.tables import build_tables
    from adept_ds.reports.tables_report import write_tables

    runs = read_runs(run_dirs)
    figures, notes = run_figures(runs)
    paper = paper_figures()
    tables = build_tables(figures, paper)
    print(write_tables(tables, runs, notes, paper.source, out))
    print(f"page: {out / 'report.html'}")

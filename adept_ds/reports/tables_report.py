"""The tables of many runs as files: report.md, report.csv, report.html, and learning curves as pictures beside them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from adept_ds.files import atomic_write
from adept_ds.reports.learning_curve import compare_curves
from adept_ds.reports.pages import write_page
from adept_ds.reports.runs import RunRecord
from adept_ds.reports.tables import Cell, Measurement, Row, Table

LEGEND = (
    "Figures in percent: mean over seeds ± standard deviation. Rows marked (paper) are the paper's figures, those "
    "marked (quoted) are the paper's or quoted by it and were not run here. * : the difference to the paper exceeds "
    "the noise. ‡ : the task as it should be, the paper's figure is of the published code's form (data.variant)."
)
NOISE = (
    "Noise is 1.96 standard errors of the difference: test examples on both sides, and seeds (see "
    "adept_ds/reports/tables.py). Of several settings of a method the best by validation is shown. "
    "Each pair of methods is judged by itself: of many pairs without a difference, a few will seem to have one."
)

RECIPES = (
    "What trains each row, a column's task given by --data.tasks where it is none of the config's (in a row (m) all "
    "tasks of the column's group, by --method.tasks too where the config has that); `adept-ds recipes NAME` shows what "
    "a config reproduces and from whom its settings are."
)


@dataclass(frozen=True)
class Line:
    """A row as it is shown."""

    kind: str
    """`quoted` or `ours`, or `section` for a heading."""
    cells: tuple[str, ...]


def wide_lines(table: Table) -> list[Line]:
    """The table in the paper's layout: method, parameters, columns; our row below the paper's."""
    lines: list[Line] = []
    section = ""
    for row in table.rows:
        if row.section != section:
            section = row.section
            lines.append(Line("section", (section, "", *("" for _ in table.columns))))
        if table.has_paper:
            mark = "paper" if row.is_run else "quoted"
            figures = (_paper_text(cell) for cell in row.cells)
            lines.append(Line("quoted", (f"{row.label} ({mark})", row.paper_parameters, *figures)))
        if row.is_run:
            counts = ", ".join(_parameters_text(*counted) for counted in row.parameters)
            lines.append(Line("ours", (row.label, counts, *(_our_text(cell) for cell in row.cells))))
    return lines


def recipe_lines(table: Table) -> list[tuple[str, str]]:
    """Each row of the paper and what trains it."""
    return [(row.label, row.recipe) for row in table.rows]


def detail_lines(table: Table) -> list[dict[str, str]]:
    """One line for each measurement: heading to text."""
    return [
        {"method": row.label, "column": column, **_details(cell, cell.ours)}
        for row in table.rows
        for column, cell in zip(table.columns, row.cells, strict=True)
        if cell.ours
    ]


def markdown(tables: Sequence[Table], notes: Sequence[str], source: str) -> str:
    """All tables as Markdown, which is also what is printed."""
    parts = ["# Results", LEGEND, NOISE]
    for table in tables:
        details = detail_lines(table)
        parts += [
            f"## {table.title}",
            grid(("", "parameters", *table.columns), *(line.cells for line in wide_lines(table))),
        ]
        parts.append(grid(details[0].keys(), *(line.values() for line in details)))
        parts += [f"- {line}" for line in table.differences]
        if table.has_paper:
            parts += [RECIPES, grid(("", "adept-ds train"), *recipe_lines(table))]
    if notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join([*parts, f"Paper: {source}"]) + "\n"


def write_csv(tables: Sequence[Table], path: Path) -> None:
    """One line a place of a table, quoted figures included, unrounded."""
    records = [
        _record(table, row, column, cell)
        for table in tables
        for row in table.rows
        for column, cell in zip(table.columns, row.cells, strict=True)
        if cell.paper is not None or cell.our_mean is not None
    ]
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, list(next(iter(records), {})), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def learning_curves(records: Sequence[RunRecord]) -> dict[str, bytes]:
    """A picture for each backbone and data that runs were trained on, by its title."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.metrics:
            settings = record.settings
            data = settings.get("data.tasks") or [settings.get("data.format", "unknown data")]
            model = Path(settings.get("model.name_or_path", "unknown model")).name
            groups.setdefault(f"{model} on {', '.join(Path(name).stem for name in data)}", []).append(record)
    return {
        title: compare_curves([(_curve_label(record), record.metrics) for record in of_group], title)
        for title, of_group in sorted(groups.items())
    }


def _curve_label(record: RunRecord) -> str:
    """The method, and what makes its training loss another one than others'."""
    method, smoothing = record.settings.get("method.name", "unknown"), record.label_smoothing
    return f"{method}, label smoothing {smoothing:g} in training" if smoothing else method


def write_tables(
    tables: Sequence[Table], records: Sequence[RunRecord], notes: Sequence[str], source: str, folder: Path
) -> str:
    """Write all files into `folder`; return the Markdown."""
    pictures = learning_curves(records)
    for title, picture in pictures.items():
        name = re.sub(r"[^A-Za-z0-9.]+", "_", title)
        with atomic_write(folder / f"learning_curves-{name}.png", "wb") as file:
            file.write(picture)
    text = markdown(tables, notes, source)
    with atomic_write(folder / "report.md") as file:
        file.write(text)
    write_csv(tables, folder / "report.csv")
    write_page(
        "tables_report.html.jinja",
        folder / "report.html",
        tables=[(table, wide_lines(table), detail_lines(table), recipe_lines(table)) for table in tables],
        recipes=RECIPES,
        pictures=pictures,
        notes=notes,
        legend=LEGEND,
        noise=NOISE,
        source=source,
    )
    return text


def _paper_text(cell: Cell) -> str:
    if cell.paper is None:
        return ""
    return f"{cell.paper}" + (f" ± {cell.paper_deviation}" if cell.paper_deviation is not None else "")


def _our_text(cell: Cell) -> str:
    if cell.our_mean is None:
        return ""
    deviation = cell.ours.deviation if cell.ours else None
    text = f"{cell.our_mean:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")
    if cell.difference is not None:
        text += f" ({cell.difference:+.2f})"
    return text + "*" * (cell.exceeds_noise is True) + "‡" * cell.is_other_task


def _details(cell: Cell, ours: Measurement) -> dict[str, str]:
    low, high = ours.interval
    verdict = {True: "exceeds the noise", False: "within the noise", None: ""}[cell.exceeds_noise]
    return {
        "runs": str(ours.runs),
        "settings tried": str(ours.settings_tried),
        "validation": _validation_text(ours),
        "mean": f"{ours.mean:.2f}",
        "standard deviation": _number(ours.deviation),
        "95 % interval": f"{low:.2f} to {high:.2f}",
        "trained parameters": _parameters_text(ours.first.parameters, ours.first.tasks),
        "paper": _paper_text(cell),
        "difference": "" if cell.difference is None else f"{cell.difference:+.2f}",
        "noise": _number(cell.noise),
        "verdict": verdict + ("; other form of the task" if cell.is_other_task else ""),
    }


def _validation_text(ours: Measurement) -> str:
    """What the best checkpoints were chosen by, and its mean and standard deviation over seeds."""
    figures = ours.validation_figures
    if not figures:
        return ""
    deviation = f" ± {stdev(figures):.4f}" if len(figures) > 1 else ""
    return f"{ours.first.settings.get('eval.metric', 'loss')} {mean(figures):.4f}{deviation}"


def _parameters_text(count: int | None, tasks: int) -> str:
    if count is None:
        return ""
    return f"{count:,}" + (f" ({count / tasks:,.0f} for each of {tasks} tasks)" if tasks > 1 else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _record(table: Table, row: Row, column: str, cell: Cell) -> dict[str, Any]:
    """A line of the CSV, in the order of its columns."""
    ours = cell.ours
    first = ours.first if ours else None
    low, high = ours.interval if ours else (None, None)
    return {
        "table": table.title,
        "method": row.label,
        "column": column,
        "task": first and first.task,
        "variant": first and first.variant,
        "metric": first and first.metric,
        "runs": ours and ours.runs,
        "settings_tried": ours and ours.settings_tried,
        "validation": mean(ours.validation_figures) if ours and ours.validation_figures else None,
        "mean": cell.our_mean,
        "standard_deviation": ours and ours.deviation,
        "low": low,
        "high": high,
        "examples": first and first.examples,
        "parameters": first and first.parameters,
        "tasks": first and first.tasks,
        "paper": cell.paper,
        "paper_standard_deviation": cell.paper_deviation,
        "paper_parameters": row.paper_parameters,
        "quoted_from": row.quoted_from,
        "difference": cell.difference,
        "noise": cell.noise,
        "exceeds_noise": cell.exceeds_noise,
        "recipe": row.recipe,
        "run_folders": ours and json.dumps([str(figure.run) for figure in ours.figures]),
    }


def grid(*rows: Iterable[str]) -> str:
    """A Markdown table with columns of even width; the first row is its heading."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
    heading, *others = (f"| {line} |" for line in lines)
    return "\n".join([heading, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *others])

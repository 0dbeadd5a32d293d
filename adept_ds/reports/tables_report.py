"""The tables of many runs as files: report.md, report.csv, report.html, and learning curves as pictures beside them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from adept_ds.evaluation.comparison import difference_text
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
    "adept_ds/reports/tables.py). Of several settings of a method the best by validation is shown."
)
DETAIL_COLUMNS = (
    "method",
    "column",
    "runs",
    "settings tried",
    "validation",
    "mean",
    "standard deviation",
    "95 % interval",
    "trained parameters",
    "paper",
    "difference",
    "noise",
    "verdict",
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
            counts = ", ".join(f"{count:,}" for count in row.parameters)
            lines.append(Line("ours", (row.label, counts, *(_our_text(cell) for cell in row.cells))))
    return lines


def detail_lines(table: Table) -> list[tuple[str, ...]]:
    """One line for each measurement, as `DETAIL_COLUMNS` says."""
    return [
        (row.label, column, *_details(cell))
        for row in table.rows
        for column, cell in zip(table.columns, row.cells, strict=True)
        if cell.ours
    ]


def difference_lines(table: Table) -> list[str]:
    """Each pair of our methods on the same examples, in words."""
    return [
        f"{one.column}: {difference_text(one.difference, (one.first, one.second), one.metric)}"
        for one in table.differences
    ]


def markdown(tables: Sequence[Table], notes: Sequence[str], source: str) -> str:
    """All tables as Markdown, which is also what is printed."""
    parts = ["# Results", LEGEND, NOISE]
    for table in tables:
        parts += [f"## {table.title}", _grid([("", "parameters", *table.columns)], wide_lines(table))]
        parts.append(_grid([DETAIL_COLUMNS], [Line("ours", line) for line in detail_lines(table)]))
        parts += [f"- {line}" for line in difference_lines(table)]
    if notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join([*parts, f"Paper: {source}"]) + "\n"


def write_csv(tables: Sequence[Table], path: Path) -> None:
    """One line a place of a table, quoted figures included, unrounded."""
    fields = ["table", "method", "column", "task", "variant", "metric", "runs", "settings_tried", "validation", "mean"]
    fields += ["standard_deviation", "low", "high", "examples", "parameters", "paper", "paper_standard_deviation"]
    fields += ["paper_parameters", "quoted_from", "difference", "noise", "exceeds_noise", "run_folders"]
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        for table in tables:
            for row in table.rows:
                for column, cell in zip(table.columns, row.cells, strict=True):
                    if cell.paper is not None or cell.our_mean is not None:
                        writer.writerow({"table": table.title, "column": column} | _record(row, cell))


def write_html(
    tables: Sequence[Table], notes: Sequence[str], source: str, pictures: dict[str, bytes], path: Path
) -> None:
    """One self-contained page."""
    write_page(
        "tables_report.html.jinja",
        path,
        tables=[(table, wide_lines(table), detail_lines(table), difference_lines(table)) for table in tables],
        detail_columns=DETAIL_COLUMNS,
        pictures=pictures,
        notes=notes,
        legend=LEGEND,
        noise=NOISE,
        source=source,
    )


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
        title: compare_curves(
            [(record.settings.get("method.name", "unknown"), record.metrics) for record in of_group], title
        )
        for title, of_group in sorted(groups.items())
    }


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
    write_html(tables, notes, source, pictures, folder / "report.html")
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


def _details(cell: Cell) -> tuple[str, ...]:
    ours = cell.ours
    assert ours is not None
    low, high = ours.interval
    verdict = {True: "exceeds the noise", False: "within the noise", None: ""}[cell.exceeds_noise]
    return (
        str(ours.runs),
        str(ours.settings_tried),
        _validation_text(ours),
        f"{ours.mean:.2f}",
        _number(ours.deviation),
        f"{low:.2f} to {high:.2f}",
        "" if ours.first.parameters is None else f"{ours.first.parameters:,}",
        _paper_text(cell),
        "" if cell.difference is None else f"{cell.difference:+.2f}",
        _number(cell.noise),
        verdict + ("; other form of the task" if cell.is_other_task else ""),
    )


def _validation_text(ours: Measurement) -> str:
    """What the best checkpoints were chosen by, and its mean and standard deviation over seeds."""
    figures = ours.validation_figures
    if not figures:
        return ""
    deviation = f" ± {stdev(figures):.4f}" if len(figures) > 1 else ""
    return f"{ours.first.settings.get('eval.metric', 'loss')} {mean(figures):.4f}{deviation}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _record(row: Row, cell: Cell) -> dict[str, Any]:
    record = {
        "method": row.label,
        "mean": cell.our_mean,
        "paper": cell.paper,
        "paper_standard_deviation": cell.paper_deviation,
        "paper_parameters": row.paper_parameters,
        "quoted_from": row.quoted_from,
        "difference": cell.difference,
        "noise": cell.noise,
        "exceeds_noise": cell.exceeds_noise,
    }
    if cell.ours:
        ours, first = cell.ours, cell.ours.first
        record |= {"task": first.task, "variant": first.variant, "metric": first.metric, "runs": ours.runs}
        record |= {"settings_tried": ours.settings_tried, "standard_deviation": ours.deviation}
        record |= {"validation": mean(ours.validation_figures) if ours.validation_figures else None}
        record |= dict(zip(("low", "high"), ours.interval, strict=True))
        record |= {"examples": first.examples, "parameters": first.parameters}
        record["run_folders"] = json.dumps([str(figure.run) for figure in ours.figures])
    return record


def _grid(header: Sequence[tuple[str, ...]], lines: Sequence[Line]) -> str:
    """A Markdown table with columns of even width."""
    rows = [*header, *(line.cells for line in lines)]
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = [
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])

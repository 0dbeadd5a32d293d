"""The figures of the ADePT paper, table by table, as the report shows them beside one's own.

They lie in `paper_figures.json`: percentages as printed, with the standard deviation over runs where the paper gives
one, and where the paper itself quotes a figure, from whom.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from pydantic import Field

from adept_ds.config.base import Section


class PaperColumn(Section):
    """One measured quantity, or the mean of others."""

    label: str
    task: str | None = None
    """The task, or `data.format` where programs are run; None for a mean."""
    metric: str | None = None
    """The task's metric."""
    mean_of: tuple[str, ...] = ()
    """Labels of the columns that this one is the mean of."""
    k_shot: int | None = None
    """Training examples of a few-shot run."""
    settings: dict[str, Any] = Field(default={})
    """Settings that a run must have to stand in this column."""


class PaperRow(Section):
    """One method's figures."""

    label: str
    section: str = ""
    """Heading that the row stands under."""
    method: str
    """`method.name` of runs that the row is compared with."""
    config: str | None = None
    """The config that reproduces the row; the table's if not given."""
    changes: dict[str, Any] = Field(default={})
    """Settings that it takes in place of the config's, beside the method's name and `settings`."""
    multi_task: bool = False
    """Whether runs are trained on several tasks at once; else on one."""
    from_source: bool | None = None
    """Whether runs start from an adapter of another task (`method.init_from`); None where they may."""
    parameters: str
    """Trained parameters, as printed."""
    quoted_from: str | None = None
    """Whom the paper quotes; None for its own runs."""
    settings: dict[str, Any] = Field(default={})
    """Settings that a run must have to stand in this row."""
    values: tuple[float | None, ...]
    """Figures by column, in percent; None where the paper has none."""
    deviations: tuple[float | None, ...] | None = None
    """Standard deviations over runs, where the paper gives them."""


class PaperTable(Section):
    """One table, for one backbone."""

    number: int
    title: str
    backbone: str
    models: tuple[str, ...]
    """Last parts of `model.name_or_path`, in lower case, that are this backbone."""
    config: str
    """The config that its rows are reproduced by, with the changes of each."""
    columns: tuple[PaperColumn, ...]
    rows: tuple[PaperRow, ...]


def reproduction(table: PaperTable, row: PaperRow) -> tuple[str, dict[str, Any]]:
    """Return the config that reproduces a row and the settings to change in it.

    The column says the task (`data.tasks`), and what else it asks for.
    """
    if row.config is not None:
        return row.config, row.changes
    return table.config, {"method.name": row.method, **row.settings, **row.changes}


class PaperFigures(Section):
    """All figures."""

    source: str
    tables: tuple[PaperTable, ...]
    analyses: dict[str, dict[str, Any]]
    """Figures of tables 2, 8 and 9 that are no scores, by what they measure."""


@cache
def paper_figures() -> PaperFigures:
    """The paper's figures."""
    text = (resources.files("adept_ds.reports") / "paper_figures.json").read_text(encoding="utf-8")
    return PaperFigures.model_validate_json(text)

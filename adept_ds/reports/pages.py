"""HTML pages from the templates beside this file; each page is one file, its pictures included."""

from __future__ import annotations

import base64
import json
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from adept_ds.files import atomic_write


def write_page(template: str, path: Path, **values: Any) -> None:
    """Fill a template with values and write the page. Every text in them is escaped; pictures are PNGs as bytes."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("adept_ds.reports", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    environment.filters["literal"] = repr
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    # Unlike Jinja's own filter, which writes < as \u003c for scripts; here the page's escaping does that.
    environment.filters["as_json"] = partial(json.dumps, indent=2, ensure_ascii=False)
    with atomic_write(path) as file:
        file.write(environment.get_template(template).render(values))


def png(figure: Figure) -> bytes:
    """The picture as the pages take it."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()

"""What an X-ray of an adapter has shown: sentences for the terminal, a page with pictures, a file for programs.

OUT/xray.json     all figures; of what has a value for each token the quantiles
OUT/xray.html     from `xray.html.jinja`
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from adept_ds.evaluation.xray import APART, TOGETHER, XRay
from adept_ds.files import write_json
from adept_ds.reports.pages import png, write_page

JSON_NAME, PAGE_NAME = "xray.json", "xray.html"
QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
ROWS, OFFSETS, PROMPT, BAD = "#1f4e8c", "#c2571a", "#2f8f6b", "#a83232"
BINS, POINTS = 80, 8_000
"""Of a histogram; and tokens that a picture shows as points, evenly chosen."""


def write_xray(seen: XRay, out: Path) -> Path:
    """Write both files into `out`; return the page's path."""
    write_json(out / JSON_NAME, xray_json(seen))
    write_page(
        "xray.html.jinja",
        out / PAGE_NAME,
        xray=seen,
        rows=spread(seen.rows),
        offsets=None if seen.offsets is None else spread(seen.offsets),
        shares=None if seen.offsets is None else spread(seen.shares),
        lengths=_lengths(seen),
        units=_units(seen) if seen.units else None,
        neighbours=None if seen.nearest is None else _neighbours(seen),
        together=TOGETHER,
        apart=APART,
    )
    return out / PAGE_NAME


def xray_json(seen: XRay) -> dict[str, Any]:
    """All figures: an `XRay` in which a tensor is its spread."""
    values = asdict(seen)
    values["row_lengths"] = spread(values.pop("rows"))
    offsets, nearest = values.pop("offsets"), values.pop("nearest")
    if offsets is not None:
        values["offset_lengths"], values["offset_shares"] = spread(offsets), spread(seen.shares)
    if nearest is not None:
        sides = zip(("before", "after"), nearest.unbind(1), strict=True)
        values["neighbour_cosines"] = {side: spread(cosines) for side, cosines in sides}
        values["neighbours_looked_for"] = len(nearest)
    return values


def spread(values: Tensor) -> dict[str, float]:
    """Quantiles of the values [n] by their names, such as `50%`."""
    ordered = values.sort().values
    return {f"{100 * q:g}%": float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES}


def xray_text(seen: XRay) -> str:
    """What the terminal shows: the figures in a few lines, then what is wrong."""
    rows = spread(seen.rows)
    lines = [
        f"{seen.adapter} ({seen.method['name']}) on {seen.backbone}: {seen.tokens:,} tokens",
        f"  rows of the table: length {rows['50%']:.3g} (median), {rows['0%']:.3g} to {rows['100%']:.3g}",
    ]
    if seen.prompt:
        lengths = [vector.length for vector in seen.prompt]
        lines.append(f"  prompt: {len(lengths)} vectors of length {min(lengths):.3g} to {max(lengths):.3g}")
        lines += [f"    {one.name:>4}  {one.length:8.3g}  near {_near(one.nearest)}" for one in seen.prompt[:10]]
        if len(lengths) > 10:
            lines.append(f"    and {len(lengths) - 10} more, see the page")
    if seen.offsets is not None and seen.mean_cosine:
        shares = spread(seen.shares)
        lines += [
            f"  offset / row: {shares['50%']:.3g} (median), {shares['0%']:.3g} to {shares['100%']:.3g}",
            f"    moved most:  {', '.join(f'{one.token.text!r} {one.share:.3g}' for one in seen.moved_most[:5])}",
            f"    moved least: {', '.join(f'{one.token.text!r} {one.share:.3g}' for one in seen.moved_least[:5])}",
        ]
        lines += [
            f"  unit {unit.number} of {len(seen.units)}: {unit.woken:,} tokens wake it ({100 * unit.share:.1f} %)"
            + (f", most {', '.join(repr(one.text) for one in unit.woken_most_by)}" if unit.woken_most_by else "")
            for unit in seen.units
        ]
        before, after = seen.mean_cosine
        lines.append(f"  two tokens have a cosine of {before:.3f} on average before, {after:.3f} with the adapter")
    lines += [f"  note: {note}" for note in seen.notes]
    lines += [f"  warning: {warning}" for warning in seen.warnings] or ["  nothing is wrong"]
    return "\n".join(lines)


def _near(nearest: Any) -> str:
    return ", ".join(f"{one.token.text!r} {one.cosine:.2f}" for one in nearest)


def _panel(width: float = 8.5, height: float = 3.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _lengths(seen: XRay) -> bytes:
    """PNG: how long rows, offsets and prompt vectors are."""
    figure, axes = _panel()
    prompt = torch.tensor([vector.length for vector in seen.prompt])
    offsets = torch.empty(0) if seen.offsets is None else seen.offsets
    every = torch.cat([seen.rows, offsets, prompt])
    positive = every[every > 0]
    low, high = float(positive.min()), float(positive.max())
    edges = np.geomspace(0.9 * low, 1.1 * high, BINS).tolist()
    axes.hist(seen.rows.numpy(), bins=edges, color=ROWS, alpha=0.65, label="rows of the table")
    if len(offsets):
        axes.hist(offsets.numpy(), bins=edges, color=OFFSETS, alpha=0.65, label="offsets")
    for number, length in enumerate(prompt.tolist()):
        axes.axvline(length, color=PROMPT, linewidth=1.2, label="prompt vectors" if number == 0 else None)
    axes.set_xscale("log")
    axes.set_xlabel("length")
    axes.set_ylabel("tokens")
    axes.legend(frameon=False, fontsize=9)
    return png(figure)


def _units(seen: XRay) -> bytes:
    """PNG: the share of the vocabulary that wakes each unit."""
    figure, axes = _panel(height=1.1 + 0.28 * min(len(seen.units), 40))
    shown = seen.units[:40]
    colours = [BAD if unit.state in ("dead", "without effect") else ROWS for unit in shown]
    axes.barh([str(unit.number) for unit in shown], [100 * unit.share for unit in shown], color=colours)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.set_ylabel("unit")
    axes.set_xlabel("tokens that wake it, in %")
    return png(figure)


def _neighbours(seen: XRay) -> bytes:
    """PNG: the cosine of each token with its nearest one, before and after."""
    assert seen.nearest is not None
    figure, axes = _panel(width=5.4, height=5.0)
    step = max(1, len(seen.nearest) // POINTS)
    before, after = seen.nearest[::step].unbind(1)
    axes.plot(before.numpy(), after.numpy(), ".", color=ROWS, markersize=2, alpha=0.4)
    low = float(seen.nearest.min())
    axes.plot([low, 1], [low, 1], color="#5c6875", linewidth=0.8)
    fallen = [pair for pair in seen.pairs if pair.fallen]
    axes.plot([one.cosines[0] for one in fallen], [one.cosines[1] for one in fallen], "o", color=BAD, markersize=4)
    axes.set_xlabel("cosine with the nearest token, before")
    axes.set_ylabel("and with the adapter")
    return png(figure)

"""The picture of a run: losses, graded evaluations and learning rates over the optimizer steps; and of many runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adept_ds.reports.pages import png

RAW, SMOOTH, EVALUATION = "#b8c4d6", "#1f4e8c", "#c2571a"
GRADED = {"eval/pass@1": "pass@1 in %", "eval/task": "task metric in %"}
"""Evaluation that has a panel of its own to the panel's label."""
RATES = ("#1f4e8c", "#2f8f6b", "#8a5a9e")


def learning_curve(metrics: Sequence[dict[str, Any]], title: str, label_smoothing: float = 0.0) -> bytes:
    """PNG of training loss (raw and its running mean), evaluations and learning rates over the steps.

    Args:
        metrics: Lines of the run.
        title: Heading of the picture.
        label_smoothing: Of the training loss, which is then said beside it.
    """
    rates = sorted({key for line in metrics for key in line if key.startswith("learning_rate/")})
    graded = next((key for key in GRADED if any(key in line for line in metrics)), None)
    heights = [3.0] + [1.2] * bool(graded) + [1.2] * bool(rates)
    figure = Figure(figsize=(8.5, 1.3 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    figure.suptitle(title, fontsize=13, fontweight="bold")
    _draw_loss(panels[0], metrics, label_smoothing)
    if graded:
        steps, scores = series(metrics, graded)
        panels[1].plot(steps, [100 * score for score in scores], "o-", color=EVALUATION, markersize=4)
        panels[1].set_ylabel(GRADED[graded])
    if rates:
        peaks = []
        for key, colour in zip(rates, RATES, strict=False):
            label = key.removeprefix("learning_rate/").replace("_", " ")
            steps, values = series(metrics, key)
            panels[-1].plot(steps, values, color=colour, linewidth=1.6, label=label)
            peaks.append(max(values))
        wide_apart = 0 < 20 * min(peaks) < max(peaks)
        if wide_apart:
            panels[-1].set_yscale("log", nonpositive="mask")
        else:
            panels[-1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        panels[-1].set_ylabel("learning rate")
        panels[-1].legend(frameon=False, loc="lower center" if wide_apart else "upper right", ncols=2, fontsize=9)
    for panel in panels:
        panel.grid(color="#e8e8e8", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("optimizer step")
    figure.align_ylabels(panels)
    return png(figure)


def compare_curves(curves: Sequence[tuple[str, Sequence[dict[str, Any]]]], title: str) -> bytes:
    """PNG of several runs: running mean of the training loss, validation loss and graded evaluations over the steps.

    Args:
        curves: Label and metrics of each run; runs of one label share a colour.
        title: Heading of the picture.
    """
    panels = {"loss": "training loss, running mean", "eval/loss": "validation loss", **GRADED}
    shown = [key for key in panels if any(key in line for _, metrics in curves for line in metrics)]
    figure = Figure(figsize=(1 + 4.6 * len(shown), 4), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    labels = list(dict.fromkeys(label for label, _ in curves))
    for axes, key in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for label, metrics in curves:
            steps, values = series(metrics, key)
            values = smooth(values) if key == "loss" else [100 * v for v in values] if key in GRADED else values
            axes.plot(steps, values, color=f"C{labels.index(label)}", linewidth=1.4, alpha=0.85)
        axes.set_title(panels[key], fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.grid(color="#e8e8e8", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    lines = [Line2D([], [], color=f"C{number}") for number in range(len(labels))]
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return png(figure)


def _draw_loss(panel: Axes, metrics: Sequence[dict[str, Any]], label_smoothing: float) -> None:
    kind, other = (f" with label smoothing {label_smoothing:g}", " without") if label_smoothing else ("", "")
    steps, losses = series(metrics, "loss")
    if losses:
        panel.plot(steps, losses, color=RAW, linewidth=1, label=f"training{kind}")
        panel.plot(steps, smooth(losses), color=SMOOTH, linewidth=2, label=f"training{kind}, running mean")
    steps, losses = series(metrics, "eval/loss")
    if losses:
        best = min(range(len(losses)), key=losses.__getitem__)
        label = f"validation{other}, best {losses[best]:.3f} at step {steps[best]}"
        panel.plot(steps, losses, "o-", color=EVALUATION, linewidth=1.4, markersize=4, label=label)
        panel.plot(steps[best], losses[best], "o", markersize=10, markerfacecolor="none", markeredgecolor=EVALUATION)
    panel.set_ylabel("loss per label token")
    panel.legend(frameon=False, fontsize=9)


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of about a tenth of the points, shorter at the ends; NaN and infinity are left out.

    Centred, since a trailing average of a falling curve lies above it.
    """
    reach = max(1, len(values) // 20)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    finite = ([value for value in window if math.isfinite(value)] for window in windows)
    return [math.fsum(window) / len(window) if window else math.nan for window in finite]


def series(metrics: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the metrics lines that have `key`."""
    lines = [line for line in metrics if key in line]
    return [line["step"] for line in lines], [float(line[key]) for line in lines]

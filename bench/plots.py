"""Pictures of the rows of a table: curves, and rooflines. A plot is data, as a record holds it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from models.files import atomically

INK, FAINT = "#2b2d31", "#e3e5e8"
COLORS = ("#d9622b", "#3b6ea8", "#4f9d69", "#8d6cab", "#c2a83e", "#5aa9b8", "#b0506a", "#8a8f98")

MARKERS = ("o", "s", "^")


def draw(plot: Mapping[str, Any], path: pathlib.Path, subtitle: str) -> None:
    """Draws a plot.

    Args:
      plot: "kind" ("lines" or "roofline"), "title", "rows", and the headings "x", "y" and "by" of
        what is drawn; "log" for a logarithmic x; for a roofline "peak", in the unit of y, and
        "bandwidth", GB/s.
      path: the PNG file to make.
      subtitle: the circumstances, with the word predicted or measured.

    Raises:
      ValueError: if the kind is unknown.
    """
    if plot["kind"] not in ("lines", "roofline"):
        raise ValueError(f"a plot of kind {plot['kind']!r} is neither 'lines' nor 'roofline'")
    figure = Figure(figsize=(8.4, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    figure.suptitle(plot["title"], x=0.01, ha="left", fontsize=12, color=INK)
    axes.set_title(subtitle, loc="left", fontsize=8.5, color=INK)
    x, y, by = plot["x"], plot["y"], plot["by"]
    rows = [row for row in plot["rows"] if row.get(x) is not None and row.get(y) is not None]
    line = "-" if plot["kind"] == "lines" else "none"
    for i, name in enumerate(dict.fromkeys(row[by] for row in rows)):
        points = sorted((row[x], row[y]) for row in rows if row[by] == name)
        color = COLORS[i % len(COLORS)]
        marker = MARKERS[i // len(COLORS) % len(MARKERS)]
        axes.plot(
            *zip(*points, strict=True),
            linestyle=line,
            marker=marker,
            markersize=4,
            label=name,
            color=color,
        )
    if plot["kind"] == "roofline":
        _roof(axes, rows, x, plot["peak"], plot["bandwidth"])
    elif plot.get("log"):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row[x] for row in rows}))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.minorticks_off()
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.set_ylim(bottom=0 if plot["kind"] == "lines" else None)
    axes.grid(color=FAINT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    with atomically(path) as draft:
        figure.savefig(draft)


def _roof(axes: Any, rows: list[Any], x: str, peak: float, bandwidth: float) -> None:
    """`min(peak, bandwidth * x)`, on logarithmic axes."""
    ridge = 1e3 * peak / bandwidth  # TFLOP/s over GB/s: FLOPs of a byte
    left = min([row[x] for row in rows] + [ridge]) / 4
    right = max([row[x] for row in rows] + [ridge]) * 4
    roof = [bandwidth * left / 1e3, peak, peak]
    axes.plot([left, ridge, right], roof, color=INK, linewidth=1, label="the chip's peaks")
    axes.set_xscale("log")
    axes.set_yscale("log")

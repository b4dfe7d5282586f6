"""The picture of a comparison: bars of compute and waiting."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from models.files import atomically

COMPUTE, WAITING, COPIES, INK, FAINT = "#3b6ea8", "#d9622b", "#8a8f98", "#2b2d31", "#e3e5e8"
PARTS = {"compute": COMPUTE, "exposed": WAITING, "copies": COPIES}


def comparison(rows: Sequence[Mapping[str, Any]], path: pathlib.Path, title: str) -> None:
    """A bar for each way: compute, and waiting for collectives and for copies; the fastest on top.

    Args:
      rows: from `comparison.as_dicts`, as a record has them.
      path: the PNG file to make.
      title: what is written above.
    """
    ran = sorted((row for row in rows if row.get("seconds")), key=lambda row: row["seconds"])
    others = [row for row in rows if not row.get("seconds")]
    figure = Figure(figsize=(10, 1.3 + 0.42 * len(rows)), dpi=150, layout="constrained")
    ax = _axes(figure, title)
    width = max((row["seconds"] for row in ran), default=1e-3) * 1e3
    for y, row in enumerate(ran):
        left = 0.0
        for part, color in PARTS.items():
            taken = 1e3 * row["overlap"][f"{part}_seconds"]
            ax.barh(-y, taken, 0.62, left=left, color=color)
            left += taken
        mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
        text = f"{1e3 * row['seconds']:,.1f} ms{mfu}"
        weight = "bold" if y == 0 else "normal"
        ax.text(left + 0.01 * width, -y, text, va="center", fontsize=9, color=INK, weight=weight)
    for y, row in enumerate(others, len(ran)):
        memory = row.get("out_of_memory")
        text = f"out of memory: {memory['used'] / 2**30:.0f} GiB" if memory else "does not compile"
        ax.text(0.01 * width, -y, text, va="center", fontsize=9, color=WAITING)
    names = [row["name"] for row in (*ran, *others)]
    ax.set_yticks([-y for y in range(len(rows))], names, fontsize=9)
    ax.set_ylim(0.6 - len(rows), 0.6)
    ax.set_xlim(0, 1.45 * width)
    ax.set_xlabel("predicted milliseconds of a step", loc="right", fontsize=9, color=INK)
    labels = ("compute", "waiting for collectives", "waiting for memory")
    for color, label in zip(PARTS.values(), labels, strict=True):
        ax.barh([0], [0], color=color, label=label)
    ax.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=INK)
    _save(figure, path)


def _axes(figure: Figure, title: str) -> Any:
    ax = figure.subplots()
    ax.set_title(title, loc="left", fontsize=9, color=INK, wrap=True)
    ax.set_axisbelow(True)
    ax.grid(color=FAINT, linewidth=0.8)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(which="both", colors=INK, length=0)
    return ax


def _save(figure: Figure, path: pathlib.Path) -> None:
    with atomically(path) as draft:
        FigureCanvasAgg(figure).print_png(draft)

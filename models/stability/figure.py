"""The experiment as one picture: where training ends, and what attention did on the way."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from models.files import atomically
from models.stability.sweep import Run

LEAST = 1e-6  # of the entropies that are drawn; the logarithm of 0 has no place
WITH, WITHOUT, INK, GREY, FAINT = "#3b6ea8", "#d9622b", "#2b2d31", "#8a8f98", "#e3e5e8"


def draw(runs: Sequence[Run], path: pathlib.Path, *, show: float) -> None:
    """Final loss over learning rates; loss, logits and entropy over the steps of one of them.

    Args:
      runs: of `sweep`.
      path: the PNG to make.
      show: the learning rate whose steps are shown.
    """
    figure = Figure(figsize=(9.6, 6.0), dpi=100, layout="constrained", facecolor="white")
    title = "Without QK-norm attention logits grow, and training diverges"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    axes = figure.subplots(2, 2)
    (final, loss), (logits, entropy) = axes
    for ax in axes.flat:
        ax.grid(color=FAINT, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(which="both", colors=INK, labelsize=9, length=0)
    _final(final, runs)
    shown = [run for run in runs if run["lr"] == show]
    _steps(loss, shown, "loss", f"training loss at learning rate {show:g}")
    _steps(logits, shown, "logits", f"largest attention logit at {show:g}")
    _steps(entropy, shown, "entropy", f"least attention entropy at {show:g}, in nats")
    for ax in (logits, entropy):
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
    for ax in (loss, final):
        ax.axhline(math.log(10), color=GREY, linewidth=1.0, linestyle="--")
        ax.annotate(
            "guessing",
            (0.0, math.log(10)),
            xycoords=ax.get_yaxis_transform(),
            xytext=(4, 3),
            textcoords="offset points",
            color=GREY,
            fontsize=8,
        )
    with atomically(path) as draft:
        FigureCanvasAgg(figure).print_png(draft)


def _final(ax: Axes, runs: Sequence[Run]) -> None:
    """A dot for each run, a line through their means."""
    for qk_norm, (label, colour) in _kinds(runs).items():
        mine = [run for run in runs if run["qk_norm"] == qk_norm]
        lrs = sorted({run["lr"] for run in mine})
        means = [np.mean([run["final_loss"] for run in mine if run["lr"] == lr]) for lr in lrs]
        ax.plot(lrs, means, color=colour, linewidth=1.8, label=label)
        ax.plot(
            [run["lr"] for run in mine],
            [run["final_loss"] for run in mine],
            "o",
            color=colour,
            markersize=4.5,
            markeredgecolor="white",
        )
    ax.set_xscale("log")
    ax.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("learning rate", loc="right", fontsize=9, color=INK)
    ax.set_title("training loss at the end, by learning rate", **_title())
    ax.legend(loc="lower right", frameon=False, fontsize=9, labelcolor=INK)


def _steps(
    ax: Axes, runs: Sequence[Run], name: Literal["loss", "logits", "entropy"], title: str
) -> None:
    """A line for each run."""
    for run in runs:
        _, colour = _kinds(runs)[run["qk_norm"]]
        values = np.maximum(run[name], LEAST)
        steps = (np.arange(len(values)) + 1) * run["steps"] / len(values)
        ax.plot(steps, values, color=colour, linewidth=1.3, alpha=0.85)
    ax.set_xlabel("step", loc="right", fontsize=9, color=INK)
    ax.set_title(title, **_title())


def _kinds(runs: Sequence[Run]) -> dict[str | None, tuple[str, str]]:
    named = {run["qk_norm"] for run in runs} - {None}
    return {None: ("without QK-norm", WITHOUT)} | {
        kind: (f"with QK-norm ({kind})", WITH) for kind in named
    }


def _title() -> dict[str, Any]:
    return {"loc": "left", "fontsize": 10, "fontweight": "bold", "color": INK}

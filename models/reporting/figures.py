"""The curves of a training run as a picture."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from models.files import atomically

TRAIN, TEST, RATE, INK, FAINT = "#3b6ea8", "#d9622b", "#8a8f98", "#2b2d31", "#e3e5e8"
SMOOTH = 0.03  # of all steps: the width of the average that is drawn over the single steps


def curves(records: Sequence[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    """Loss, accuracy and learning rate over the steps, as a PNG.

    Args:
      records: lines of a metrics file: "step" with "loss", "accuracy" and "learning_rate" of a
        training step, or with "test_loss" and "test_accuracy". Null is a gap.
      path: the file to make.
      title: what is written above.
    """
    train = [record for record in records if "loss" in record]
    test = [record for record in records if "test_loss" in record]
    figure = Figure(figsize=(9.6, 4.4), dpi=160, layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    axes = figure.subplots(2, 2, sharex=True, height_ratios=(8, 1))
    (loss, accuracy), rates = axes
    for ax in axes.flat:
        ax.set_axisbelow(True)
        ax.grid(color=FAINT, linewidth=0.8)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color(RATE)
        ax.tick_params(which="both", colors=INK, labelsize=9, length=0)

    _curve(loss, "loss", train, test)
    loss.set_yscale("log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    loss.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    loss.yaxis.set_minor_formatter(NullFormatter())

    _curve(accuracy, "accuracy", train, test)
    accuracy.set_ylim(0.0, 1.02)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if test:
        accuracy.annotate(
            f"{test[-1]['test_accuracy']:.2%}",
            (test[-1]["step"], test[-1]["test_accuracy"]),
            xytext=(0, -14),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=15,
            fontweight="bold",
            color=TEST,
        )
    accuracy.legend(loc="lower right", frameon=False, fontsize=9, labelcolor=INK)

    for ax in rates:
        ax.fill_between(*_points(train, "learning_rate"), color=RATE, alpha=0.35, linewidth=0)
        ax.set_ylim(bottom=0.0)
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.set_xlabel("step", loc="right", fontsize=9, color=INK)
        ax.set_title("learning rate", loc="left", fontsize=9, color=RATE, pad=3)
    with atomically(path) as draft:
        FigureCanvasAgg(figure).print_png(draft)


def _curve(
    ax: Axes, name: str, train: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]]
) -> None:
    """Single steps faint, their running average strong, the test images as dots."""
    steps, values = _points(train, name)
    ax.plot(steps, values, color=TRAIN, alpha=0.25, linewidth=0.8)
    ax.plot(
        steps, _smooth(values), color=TRAIN, linewidth=1.8, label="training images, as they come"
    )
    ax.plot(
        *_points(test, f"test_{name}"),
        color=TEST,
        linewidth=1.6,
        marker="o",
        markersize=4.5,
        markeredgecolor="white",
        label="test images",
    )
    ax.set_title(name, loc="left", fontsize=11, fontweight="bold", color=INK)


def _points(records: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(record["step"], record[name]) for record in records]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """The average of each value and its neighbours, fewer of them at the ends."""
    window = np.ones(2 * int(SMOOTH * len(values) / 2) + 1)
    if len(values) < len(window):
        return values
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")

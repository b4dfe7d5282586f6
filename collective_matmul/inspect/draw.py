"""A timeline as a picture: lanes for compute, each way round each mesh axis, and copies.

A loop is drawn as one of its trips, in a frame that says how many there are. All else is to scale.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from collective_matmul.inspect.table import duration, unit_of
from collective_matmul.inspect.timeline import (
    COMPUTE,
    COPIES,
    COPY,
    OTHER,
    PRODUCT,
    WAIT,
    Loop,
    Timeline,
)

SIZE, DPI = (14, 5), 100  # inches, and pixels of one
_COLOURS = {
    PRODUCT: "#2b6cb0",
    OTHER: "#90cdf4",
    WAIT: "#e53e3e",
    COPY: "#a0aec0",
    "collective-permute": "#dd6b20",
    "all-gather": "#38a169",
    "reduce-scatter": "#805ad5",
    "all-reduce": "#b83280",
    "all-to-all": "#d69e2e",
}
_ANY = "#718096"  # another kind of collective
_SAID = {PRODUCT: "products", OTHER: "other compute", WAIT: "waiting", COPY: "copy"}
_OTHERS = "other axes"
_THIN = 0.005  # of the width of the picture
_ROWS = 4  # transfers of a lane that are drawn under one another


class _Bar(NamedTuple):
    lane: str
    kind: str
    start: float
    width: float


class _Frame(NamedTuple):
    loop: Loop
    start: float
    width: float
    depth: int


def draw(timeline: Timeline, path: str | os.PathLike[str], title: str) -> None:
    """Draws a timeline.

    Args:
      timeline: what to draw.
      path: of the PNG file.
      title: above the picture.

    Raises:
      ModuleNotFoundError: if matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    items = list(_items(timeline, 0.0, 0))
    bars = [item for item in items if isinstance(item, _Bar)]
    frames = [item for item in items if isinstance(item, _Frame)]
    width = _drawn(timeline)
    bars, lanes = _lanes(bars, width)
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    scale, unit = unit_of(width)
    for number, lane in enumerate(lanes):
        _lane(axes, -float(number), [bar for bar in bars if bar.lane == lane], scale)
    for frame in frames:
        _frame(axes, frame, scale)
    axes.set_yticks([-number for number in range(len(lanes))], lanes, fontsize=10)
    axes.set_ylim(0.5 - len(lanes), 0.5)
    axes.set_xlim(0, max(width / scale, 1e-12))
    axes.set_xlabel(f"{unit}, predicted" + ("; of a loop one trip is drawn" if frames else ""))
    axes.set_title(title, fontsize=11, loc="left", pad=22 if frames else None)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    seen = {bar.kind for bar in bars}
    kinds = [*(kind for kind in _COLOURS if kind in seen), *sorted(seen - set(_COLOURS))]
    patches = [Patch(color=_COLOURS.get(k, _ANY), label=_SAID.get(k, k)) for k in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=8, frameon=False, fontsize=9)
    figure.savefig(path)


def _drawn(timeline: Timeline) -> float:
    """Seconds that are drawn: loops count one trip."""
    return timeline.seconds - sum(loop.seconds - _drawn(loop.body) for loop in timeline.loops)


def _items(timeline: Timeline, offset: float, depth: int) -> Iterator[_Bar | _Frame]:
    shrunk = [(loop, _drawn(loop.body)) for loop in timeline.loops]

    def place(time: float) -> float:
        """Where a time is drawn, with the loops before it shortened."""
        saved = (
            min(max(time - loop.start, 0.0), loop.seconds) * (1 - width / loop.seconds)
            for loop, width in shrunk
            if loop.seconds
        )
        return offset + time - sum(saved)

    for event in timeline.events:
        start = place(event.start)
        yield _Bar(event.lane, event.kind, start, place(event.start + event.seconds) - start)
    for loop, width in shrunk:
        start = place(loop.start)
        yield _Frame(loop, start, width, depth)
        yield from _items(loop.body, start, depth + 1)


def _lanes(bars: list[_Bar], width: float) -> tuple[list[_Bar], list[str]]:
    """The bars and their lanes in order: those of the network that are too thin to see are one."""
    busy: dict[str, float] = {}
    for bar in bars:
        busy[bar.lane] = busy.get(bar.lane, 0.0) + bar.width
    network = sorted(busy.keys() - {COMPUTE, COPIES})
    thin = {lane for lane in network if busy[lane] < _THIN * width}
    if len(thin) > 1:
        bars = [bar._replace(lane=_OTHERS) if bar.lane in thin else bar for bar in bars]
        network = [*(lane for lane in network if lane not in thin), _OTHERS]
    return bars, [COMPUTE, *network, *({COPIES} & busy.keys())]


def _lane(axes: Any, y: float, bars: list[_Bar], scale: float) -> None:
    """One lane; transfers that overlap are drawn under one another."""
    ends: list[float] = []
    rows = []
    for bar in sorted(bars, key=lambda bar: bar.start):
        row = next((i for i, end in enumerate(ends) if end <= bar.start + 1e-12), len(ends))
        row = min(row, _ROWS - 1)
        ends[row : row + 1] = [bar.start + bar.width]
        rows.append((row, bar))
    height = 0.76 / max(1, len(ends))
    for kind in dict.fromkeys(bar.kind for bar in bars):
        for row in range(len(ends)):
            mine = [bar for at, bar in rows if at == row and bar.kind == kind]
            spans = [(bar.start / scale, bar.width / scale) for bar in mine]
            at = (y + 0.38 - (row + 1) * height, height)
            axes.broken_barh(spans, at, facecolors=_COLOURS.get(kind, _ANY), linewidth=0)


def _frame(axes: Any, frame: _Frame, scale: float) -> None:
    """A frame around a loop; the outermost ones carry their text."""
    across = axes.get_xaxis_transform()  # x in data, y from the bottom of the picture to its top
    start, end = frame.start / scale, (frame.start + frame.width) / scale
    line = {"color": "#4a5568", "linewidth": 1, "linestyle": "--", "clip_on": False}
    top = 1.0 if frame.depth else 1.03
    axes.plot([start, start, end, end], [0, top, top, 0], transform=across, **line)
    if frame.depth == 0:
        text = f" x{frame.loop.trips}: {duration(frame.loop.seconds)}"
        axes.text(start, top, text, transform=across, va="bottom", fontsize=9)

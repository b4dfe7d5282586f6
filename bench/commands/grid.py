"""Predicts ViT-22B's two projections over a grid of chips, axis sizes and tokens.

At each point: the bare product, what the cost model chooses, the plain collective, XLA's own
collective matmul and every schedule by name; forward, and with both gradients. What is asked is how
much the schedule adds to the product's own cycles, whether hops are hidden that could be, and how
far the choice is from the best way there is. Needs libtpu, and no TPU. Times are predictions.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from bench.asking import read
from bench.commands import UserError
from bench.predicted import grid
from bench.predicted.comparison import aligned, tell
from bench.predicted.grid import SLICES, Grid, Point
from bench.predicted.keeping import keep
from bench.predicted.slices import chip_of, compile_only, tpu_slice
from bench.predicted.ways import Figures, Predictor

NAME = "grid"


@dataclasses.dataclass(frozen=True)
class Options:
    """The grid."""

    chips: tuple[str, ...] = tuple(SLICES)
    """which chips"""
    axis_sizes: tuple[int, ...] = (2, 4, 8, 16)
    """devices that exchange shards"""
    tokens: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """rows of the product, of all devices that exchange shards together"""
    forward_only: bool = False
    """without the points that compute both gradients too"""
    out: pathlib.Path | None = None
    """folder for JSON and a CSV of every way, written after every point"""
    resume: bool = False
    """keeps the folder's other points, and of those asked for what is predicted already: the
    programs that have not changed since. For after a change that is not in how bench predicts"""


def main(arguments: Sequence[str]) -> int:
    """Predicts, prints and writes."""
    asked = read(Options, "grid", __doc__, arguments)
    unknown = [chip for chip in asked.chips if chip not in SLICES]
    if unknown:
        raise UserError(f"--chips: no chip {unknown[0]!r}; there are {', '.join(SLICES)}")
    most = max(max(slices) for slices in SLICES.values())
    if not asked.axis_sizes or min(asked.axis_sizes) < 2 or max(asked.axis_sizes) > most:
        raise UserError(f"--axis-sizes: {asked.axis_sizes} are not all of 2 to {most} devices")
    compile_only()
    found = grid.load(_ways(asked.out)) if asked.resume and asked.out else {}
    known = {x.program: x for ways in found.values() for x in ways.values()}
    with Predictor(known) as predictor:
        for point, ways in _predicted(predictor, list(_points(asked))):
            found[point] = ways
            if asked.out:
                _keep(asked, asked.out, found)
    summary = grid.summary(grid.rows(found))
    heads = tuple(summary[0]) if summary else ()
    lines = [tuple(_cell(row[head]) for head in heads) for row in summary]
    print(f"{aligned([heads, *lines])}\n")
    return 0


def _points(asked: Options) -> Iterator[Point]:
    passes = (False,) if asked.forward_only else (False, True)
    modes = ("gather", "scatter")
    every = itertools.product(asked.chips, asked.axis_sizes, modes, passes, asked.tokens)
    return itertools.starmap(Point, every)


def _predicted(
    predictor: Predictor, points: Sequence[Point]
) -> Iterator[tuple[Point, dict[str, Figures]]]:
    """Every point with the figures of its ways, as they come."""
    begun = [(point, dict(grid.begun(predictor, point))) for point in points]
    for point, ways in begun:
        tell(f"{point} ..")
        done = {name: future.result() for name, future in ways.items()}
        yield point, {name: figures for name, figures in done.items() if figures is not None}


def _keep(asked: Options, folder: pathlib.Path, found: Grid) -> None:
    rows = grid.rows(found)
    result = {
        "title": "ViT-22B's projections over a grid of chips, axis sizes and tokens",
        "order": 35,
        "tables": [
            {"title": "the worst point of each", "rows": grid.summary(rows)},
            {"title": "every point", "rows": rows},
        ],
    }
    chip = chip_of(tpu_slice(next(iter(SLICES[asked.chips[0]].values()))))
    keep(folder, NAME, command=NAME, options=asked, chip=chip, result=result, drawn=None)
    grid.save(found, _ways(folder))


def _ways(folder: pathlib.Path) -> pathlib.Path:
    return folder / f"{NAME}.csv"


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)

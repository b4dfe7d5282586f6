"""Predicts how ViT-22B's step grows: along tensor, chips, depth and tokens, one at a time.

Each curve is a row of `CURVES`: how long the step takes to compile, what it is predicted to take
and to hide. Needs libtpu, and no TPU. Times are predictions.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from bench.asking import read
from bench.commands import UserError
from bench.predicted import baselines
from bench.predicted.comparison import Failure, Row, aligned, tell, tried
from bench.predicted.compiling import gib
from bench.predicted.keeping import keep
from bench.predicted.prediction import accuracy
from bench.predicted.programs import Program, vit_step
from bench.predicted.slices import chip_of, compile_only, tpu_slice
from models import vit

HEADS = ("schedule", "step ms", "MFU %", "hidden %", "HBM GiB", "compile s")


@dataclasses.dataclass(frozen=True)
class Point:
    """A step.

    Args:
      value: of what grows.
      mesh: devices for data, fsdp and tensor.
      images: a device and step.
      topology: the slice.
      depth: blocks of the model.
    """

    value: int
    mesh: tuple[int, int, int] = (16, 16, 4)
    images: int = 16
    topology: str = "v4:8x8x16"
    depth: int = 48


@dataclasses.dataclass(frozen=True)
class Curve:
    """Steps that differ in one thing.

    Args:
      about: what is held, in a sentence.
      points: the steps.
    """

    about: str
    points: tuple[Point, ...]


_SLICES = {
    64: "v4:4x4x4",
    256: "v4:4x8x8",
    512: "v4:8x8x8",
    1024: "v4:8x8x16",
    2048: "v4:8x16x16",
    4096: "v4:16x16x16",
}
CURVES = {
    "tensor": Curve(
        "1,024 chips, 16 images each; fsdp x tensor = 64, repeated 16 times",
        tuple(Point(t, (16, 64 // t, t)) for t in (2, 4, 8, 16)),
    ),
    "chips": Curve(
        "16 images a chip; fsdp = 16, tensor = 4, repeated over the others",
        tuple(Point(n, (n // 64, 16, 4), topology=where) for n, where in _SLICES.items()),
    ),
    "depth": Curve(
        "1,024 chips, 4 images each, so that the deepest fits; 16 x 16 x 4",
        tuple(Point(n, images=4, depth=n) for n in (12, 24, 48, 96)),
    ),
    "images per chip": Curve(
        "1,024 chips; 16 x 16 x 4; an image is 256 tokens",
        tuple(Point(n, images=n) for n in (16, 8, 4, 2, 1)),
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to predict."""

    curves: tuple[str, ...] = tuple(CURVES)
    """names of curves: what grows"""
    schedules: tuple[str, ...] = (baselines.OURS, "gspmd")
    """ways to partition the step, rows of `python -m bench predict --compare`"""
    model: str = "22B/14"
    """any SIZE/PATCH of models/vit.py"""
    out: pathlib.Path | None = None
    """folder for JSON"""


def main(arguments: Sequence[str]) -> int:
    """Predicts, prints and writes; out of memory is a result."""
    asked = read(Options, "growth", __doc__, arguments)
    unknown = [name for name in asked.curves if name not in CURVES]
    if unknown:
        known = ", ".join(map(repr, CURVES))
        raise UserError(f"--curves: no curve {unknown[0]!r}; there are {known}")
    try:
        rows = baselines.named(asked.schedules)
    except ValueError as error:
        raise UserError(f"--schedules: {error}") from error
    compile_only()
    tables = []
    for name in asked.curves:
        found = list(_rows(name, rows, asked.model))
        lines = [
            tuple(_cell(row.get(head or "schedule")) for head in (name, *HEADS)) for row in found
        ]
        print(f"{name}: {CURVES[name].about}\n\n{aligned([(name, *HEADS), *lines])}\n")
        tables.append(_table(name, found))
    chip = chip_of(tpu_slice(next(iter(CURVES.values())).points[0].topology))
    print(f"accuracy: {accuracy(chip)}")
    if asked.out:
        title = f"How the step of {asked.model} grows"
        result = {"title": title, "order": 15, "tables": tables}
        keep(
            asked.out,
            "growth",
            command="growth",
            options=asked,
            chip=chip,
            result=result,
            drawn=None,
        )
    return 0


def _rows(name: str, ways: Sequence[baselines.Baseline], model: str) -> Iterator[dict[str, Any]]:
    for way in ways:
        for point in CURVES[name].points:
            tell(f"{name} {point.value}, {way.name} ..")
            make = functools.partial(_program, point, way, model)
            found = tried(way.name, make, way.options)
            yield {name: point.value, "schedule": way.name} | _told(found)


def _program(point: Point, way: baselines.Baseline, model: str) -> Program:
    devices = tpu_slice(point.topology)
    layout = way.layout(devices, point.mesh, token_dim=0)
    shape = vit.variant(model, remat="products", depth=point.depth)
    return vit_step(shape, layout, point.images * len(devices))


def _told(found: Row) -> dict[str, Any]:
    if isinstance(found, Failure):
        return {"note": found.reason}
    if found.out_of_memory:
        return {
            "note": f"out of memory: needs {gib(found.out_of_memory.used)}",
            "compile s": found.compile_seconds,
        }
    if found.report is None or found.seconds is None:
        return {"note": str(found.failure), "compile s": found.compile_seconds}
    return {
        "step ms": 1e3 * found.seconds,
        "MFU %": 100 * (found.mfu or 0.0),
        "hidden %": 100 * found.report.hidden_share,
        "HBM GiB": (found.hbm or 0) / 2**30,
        "compile s": found.compile_seconds,
    }


def _table(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    def plot(y: str) -> dict[str, Any]:
        return {
            "kind": "lines",
            "name": f"{name}-{y.split()[0]}".lower().replace(" ", "-"),
            "title": f"{y} against {name}",
            "x": name,
            "y": y,
            "by": "schedule",
            "log": True,
        }

    return {
        "title": f"{name}: {CURVES[name].about}",
        "rows": rows,
        "plots": [plot("MFU %"), plot("compile s")],
    }


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)

"""ViT-22B's two projections over chips, axis sizes and tokens: the points, and what each tells.

A point is one product on one ring of devices. Its ways are the bare product, the plain collective,
XLA's own collective matmul, every algorithm by name, kernels by name, and the cost model's choice.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from bench.predicted.baselines import XLA_COLLECTIVE_MATMUL
from bench.predicted.operations import Product
from bench.predicted.slices import chip_of, tpu_slice
from bench.predicted.ways import Figures, Predictor, Way
from collective_matmul import algorithms
from collective_matmul.lanes import Lane
from models.files import atomically

BOUNDS = {"gather": 1.03, "scatter": 1.06}  # of the bare product's cycles, that a schedule may take
BOUND_OF_GRADIENTS = 1.05
KERNEL = ", pallas_tpu"  # of a way's name: an algorithm by that backend, by name
BARE, CHOSEN, PLAIN, XLA = "bare product", "None", "unfused", "unfused + XLA"
# Of kernels, those that send both ways at once: ring's leaves half of the links idle, direct's hops
# are in one another's way, and kernels are what takes the longest to compile.
BY_KERNEL = ("two_way", "bidirectional")
FIELDS = tuple(x.name for x in dataclasses.fields(Figures))
_READ: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("chip", "mode", "program", "failure"), str),
    **dict.fromkeys(("devices", "tokens", "temporary"), int),
    **dict.fromkeys(("seconds", "compute", "exposed"), float),
    "grad": lambda told: told == "True",
}
WIDTH, INTO, OUT_OF = 6144, 43008, 30720
SLICES = {
    "v4": {4: "v4:2x2x1", 8: "v4:2x2x2", 16: "v4:2x2x4"},
    "v5e": {4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4"},
    "v5p": {4: "v5p:2x2x1", 8: "v5p:2x2x2", 16: "v5p:2x2x4"},
    "v6e": {4: "v6e:2x2", 8: "v6e:2x4", 16: "v6e:4x4"},
    "7x": {8: "7x:2x2x1", 16: "7x:2x2x2"},
}


class Point(NamedTuple):
    """What is multiplied where; `grad` is with both gradients."""

    chip: str
    devices: int
    mode: str
    grad: bool
    tokens: int

    def __str__(self) -> str:
        what = f"{self.mode}, {self.tokens:,} tokens{', with gradients' * self.grad}"
        return f"{self.chip}, {self.devices} devices, {what}"


Grid = dict[Point, dict[str, Figures]]  # of every point, the figures of its ways by name


def begun(predictor: Predictor, point: Point) -> Iterator[tuple[str, Future[Figures | None]]]:
    """The ways of a point, begun; of algorithms that walk the same lanes here, the first."""
    t = point.devices
    product = _product(point)
    topology = _topology(point)
    way = Way(topology, t, product)

    def submit(kernel: bool = False, **changes: Any) -> Future[Figures | None]:
        return predictor.submit(dataclasses.replace(way, **changes), kernel)

    yield BARE, submit(bare=True)
    yield PLAIN, submit(backend=PLAIN)
    yield XLA, submit(backend=PLAIN, options=tuple(XLA_COLLECTIVE_MATMUL.items()))
    for name in _distinct(algorithms.names(), t):
        yield name, submit(algorithm=name, backend="xla")
    for name in _distinct(BY_KERNEL, t):
        yield f"{name}{KERNEL}", submit(True, algorithm=name, backend="pallas_tpu")
    told = product.explained(t, chip_of(tpu_slice(topology)))
    yield CHOSEN, submit(told.chosen.plan.backend == "pallas_tpu")  # often one of the others


def _product(point: Point) -> Product:
    t = point.devices
    k, n = (WIDTH, INTO // t) if point.mode == "gather" else (OUT_OF // t, WIDTH)
    return Product(point.mode, point.tokens, k, n, "bfloat16", point.grad)


def _topology(point: Point) -> str:
    return next(x for count, x in SLICES[point.chip].items() if count >= point.devices)


def _distinct(names: Sequence[str], devices: int) -> Iterator[str]:
    walked: list[tuple[Lane, ...]] = []
    for name in names:
        lanes = algorithms.lanes(name, devices)
        if lanes not in walked:
            walked.append(lanes)
            yield name


def load(path: pathlib.Path) -> Grid:
    """The grid in a file that `save` wrote; empty if there is none."""
    grid: Grid = {}
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as lines:
            for line in csv.DictReader(lines):
                point = Point(*(_READ[x](line[x]) for x in Point._fields))
                told = {x: _READ[x](line[x]) for x in FIELDS if line[x]}
                grid.setdefault(point, {})[line["way"]] = Figures(**told)
    return grid


def save(grid: Grid, path: pathlib.Path) -> None:
    """Writes every way of every point, a line each."""
    with atomically(path) as draft, draft.open("w", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow((*Point._fields, "way", *FIELDS))
        for point in sorted(grid, key=_place):
            for way, found in grid[point].items():
                lines.writerow((*point, way, *dataclasses.astuple(found)))


def rows(grid: Grid) -> list[dict[str, Any]]:
    """A row for every point, in their order."""
    return [point._asdict() | _told(point, grid[point]) for point in sorted(grid, key=_place)]


def _place(point: Point) -> tuple[Any, ...]:
    return (list(SLICES).index(point.chip), *point[1:])


def _told(point: Point, ways: Mapping[str, Figures]) -> dict[str, Any]:
    """What a point is asked for."""
    found = {name: x for name, x in ways.items() if x.seconds}
    if BARE not in found or CHOSEN not in found:
        return {"note": "does not compile"}
    seconds = {name: x.seconds or 0.0 for name, x in found.items() if name != BARE}
    took = seconds.pop(CHOSEN)
    chosen, plain, own = found[CHOSEN], found.get(PLAIN), found[BARE].compute or 0.0
    kernels = {name: x for name, x in seconds.items() if name.endswith(KERNEL)}
    best = min(seconds.keys() - kernels, key=lambda name: (seconds[name], name))
    like = (name for name in seconds if found[name].program == chosen.program)
    return {
        "bare us": 1e6 * own,
        "None us": 1e6 * took,
        "None is": next(like, "another"),
        "compute of bare": (chosen.compute or 0.0) / own,
        "wire of products": _wire(point) / _beside(point, own),
        "exposed us": 1e6 * (chosen.exposed or 0.0),
        "best": best,
        "of the best": took / seconds[best],
        "of a kernel": took / min(kernels.values()) if kernels else None,
        "of the plain's memory": _share(chosen.temporary, plain.temporary if plain else None),
    }


@functools.cache
def _wire(point: Point) -> float:
    """Seconds of all hops once around, both ways at once: what links need at the least."""
    told = _product(point).explained(point.devices, chip_of(tpu_slice(_topology(point))))
    name = "bidirectional" if point.devices > 2 else "direct"
    options = (told.chosen, *told.alternatives)
    return next(x.wire for x in options if x.plan.algorithm == name)


def _beside(point: Point, bare: float) -> float:
    """Seconds of the products that may lie beside the hops, of each pass all but one chunk's.

    The gradient of a gather has two journeys beside one product, of an operand and of the sums.
    """
    t = point.devices
    journeys = 2 if point.grad and point.mode == "gather" else 1
    return bare / (3 if point.grad else 1) * (t - 1) / t / journeys


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every chip, mode and direction: the median and the worst over axis sizes and tokens."""
    found = []
    told = [row for row in rows if "None us" in row]
    kinds = dict.fromkeys((row["chip"], row["mode"], row["grad"]) for row in told)
    for chip, mode, grad in kinds:
        points = [x for x in told if (x["chip"], x["mode"], x["grad"]) == (chip, mode, grad)]
        compute = sorted(x["compute of bare"] for x in points)
        bound = BOUND_OF_GRADIENTS if grad else BOUNDS[mode]
        fit = [x for x in points if x["wire of products"] <= 1]
        behind = max(points, key=lambda x: x["of the best"])
        found.append(
            {
                "chip": chip,
                "mode": mode,
                "with gradients": grad,
                "points": len(points),
                "compute of bare, median": compute[len(compute) // 2],
                "worst": compute[-1],
                "within the bound": sum(x <= bound for x in compute),
                "hops fit": len(fit),
                "and are hidden": sum(x["exposed us"] <= 0.01 * x["None us"] for x in fit),
                "None within 2 %": sum(x["of the best"] <= 1.02 for x in points),
                "None of the best, worst": behind["of the best"],
                "there": "{devices} devices, {tokens} tokens: {best}".format_map(behind),
                "None of a kernel, worst": max(x["of a kernel"] or 0.0 for x in points),
            }
        )
    return found


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None

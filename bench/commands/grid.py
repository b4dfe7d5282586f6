"""Predicts ViT-22B's two projections over a grid of chips, axis sizes and tokens.

At each point: the bare product, what the cost model chooses, the plain collective, XLA's own
collective matmul and every schedule by name; forward, and with both gradients. What is asked is how
much the schedule adds to the product's own cycles, whether hops are hidden that could be, and how
far the choice is from the best way there is. Needs libtpu, and no TPU. Times are predictions.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from bench.asking import read
from bench.commands import UserError
from bench.predicted.baselines import XLA_COLLECTIVE_MATMUL
from bench.predicted.comparison import aligned, tell
from bench.predicted.keeping import keep
from bench.predicted.operations import Product
from bench.predicted.slices import chip_of, compile_only, tpu_slice
from bench.predicted.ways import Figures, Predictor, Way
from bench.record import load
from collective_matmul import algorithms
from collective_matmul.lanes import Lane
from models.files import atomically

POINT = ("chip", "devices", "mode", "grad", "tokens")  # what says which point a row is
BARE, CHOSEN, PLAIN, XLA = "bare product", "None", "unfused", "unfused + XLA"
# Of kernels, those that send both ways: over 48 points that were predicted with all four, none of
# the others was ever the best, and kernels are what takes the longest to compile.
BY_KERNEL = ("two_way", "bidirectional")
NAME = "grid"
FIELDS = dataclasses.fields(Figures)
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
    rows, ways = _kept(asked.out) if asked.resume and asked.out else ({}, {})
    known = {x.program: x for point in ways.values() for x in point.values()}
    with Predictor(known) as predictor:
        for point, found in _predicted(predictor, list(_points(asked))):
            key = tuple(point.values())
            rows[key], ways[key] = point | _told(found), found
            if asked.out:
                _keep(asked, rows, ways)
    summary = _summary(_ordered(rows))
    heads = tuple(summary[0]) if summary else ()
    lines = [tuple(_cell(row[head]) for head in heads) for row in summary]
    print(f"{aligned([heads, *lines])}\n")
    return 0


def _points(asked: Options) -> Iterator[dict[str, Any]]:
    passes = (False,) if asked.forward_only else (False, True)
    for values in itertools.product(
        asked.chips, asked.axis_sizes, ("gather", "scatter"), passes, asked.tokens
    ):
        yield dict(zip(POINT, values, strict=True))


def _predicted(
    predictor: Predictor, points: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Figures]]]:
    """Every point with the figures of its ways, as they come."""
    begun = [(point, dict(_begun(predictor, **point))) for point in points]
    for point, ways in begun:
        tell(" ".join(map(str, point.values())))
        done = {name: future.result() for name, future in ways.items()}
        yield point, {name: found for name, found in done.items() if found is not None}


def _begun(
    predictor: Predictor, chip: str, devices: int, mode: str, grad: bool, tokens: int
) -> Iterator[tuple[str, Future[Figures | None]]]:
    """The ways of a point; of algorithms that walk the same lanes here, the first."""
    k, n = (WIDTH, INTO // devices) if mode == "gather" else (OUT_OF // devices, WIDTH)
    product = Product(mode, tokens, k, n, "bfloat16", grad)
    topology = next(where for count, where in SLICES[chip].items() if count >= devices)
    way = Way(topology, devices, product)

    def submit(kernel: bool = False, **changes: Any) -> Future[Figures | None]:
        return predictor.submit(dataclasses.replace(way, **changes), kernel)

    yield BARE, submit(bare=True)
    yield PLAIN, submit(backend=PLAIN)
    yield XLA, submit(backend=PLAIN, options=tuple(XLA_COLLECTIVE_MATMUL.items()))
    for name in _distinct(algorithms.names(), devices):
        yield name, submit(algorithm=name, backend="xla")
    for name in _distinct(BY_KERNEL, devices):
        yield f"{name}, pallas_tpu", submit(True, algorithm=name, backend="pallas_tpu")
    told = product.explained(devices, chip_of(tpu_slice(topology)))
    yield CHOSEN, submit(told.chosen.plan.backend == "pallas_tpu")  # often one of the others


def _distinct(names: Sequence[str], devices: int) -> Iterator[str]:
    walked: list[tuple[Lane, ...]] = []
    for name in names:
        lanes = algorithms.lanes(name, devices)
        if lanes not in walked:
            walked.append(lanes)
            yield name


def _kept(
    folder: pathlib.Path,
) -> tuple[dict[tuple[Any, ...], dict[str, Any]], dict[tuple[Any, ...], dict[str, Figures]]]:
    """The rows and the ways of a grid that was written into the folder, by point."""
    path = folder / f"{NAME}.json"
    if not path.is_file():
        return {}, {}
    rows = {tuple(row[x] for x in POINT): row for row in load(path).result["tables"][1]["rows"]}
    ways: dict[tuple[Any, ...], dict[str, Figures]] = {}
    with path.with_suffix(".csv").open(encoding="utf-8", newline="") as lines:
        for line in csv.DictReader(lines):
            point = tuple(_READ[x](line[x]) for x in POINT)
            told = {x.name: _READ[x.name](line[x.name]) for x in FIELDS if line[x.name]}
            ways.setdefault(point, {})[line["way"]] = Figures(**told)
    return rows, ways


def _ordered(known: Mapping[tuple[Any, ...], Any]) -> list[Any]:
    return [known[x] for x in _sorted(known)]


def _sorted(points: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return sorted(points, key=lambda x: (list(SLICES).index(x[0]), *x[1:]))


def _keep(
    asked: Options,
    rows: Mapping[tuple[Any, ...], dict[str, Any]],
    ways: Mapping[tuple[Any, ...], Mapping[str, Figures]],
) -> None:
    chip = chip_of(tpu_slice(next(iter(SLICES[asked.chips[0]].values()))))
    ordered = _ordered(rows)
    result = {
        "title": "ViT-22B's projections over a grid of chips, axis sizes and tokens",
        "order": 35,
        "tables": [
            {"title": "the worst point of each", "rows": _summary(ordered)},
            {"title": "every point", "rows": ordered},
        ],
    }
    assert asked.out is not None
    keep(asked.out, NAME, command="grid", options=asked, chip=chip, result=result, drawn=None)
    with atomically(asked.out / f"{NAME}.csv") as draft, draft.open("w", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow((*POINT, "way", *(x.name for x in FIELDS)))
        for point in _sorted(ways):
            for way, found in ways[point].items():
                lines.writerow((*point, way, *dataclasses.astuple(found)))


def _told(ways: Mapping[str, Figures]) -> dict[str, Any]:
    """What a point is asked for."""
    found = {name: x for name, x in ways.items() if x.seconds}
    if BARE not in found or CHOSEN not in found:
        return {"note": "does not compile"}
    seconds = {name: x.seconds or 0.0 for name, x in found.items()}
    best = min(seconds.keys() - {BARE, CHOSEN}, key=lambda name: (seconds[name], name))
    chosen, plain, own = found[CHOSEN], found.get(PLAIN), found[BARE].compute or 0.0
    return {
        "bare us": 1e6 * own,
        "None us": 1e6 * seconds[CHOSEN],
        "compute of bare": (chosen.compute or 0.0) / own,
        "exposed us": 1e6 * (chosen.exposed or 0.0),
        "best": best,
        "of the best": seconds[CHOSEN] / seconds[best],
        "of the plain's memory": _share(chosen.temporary, plain.temporary if plain else None),
    }


def _summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every chip, mode and direction: the median and the worst over axis sizes and tokens."""
    summary = []
    told = [row for row in rows if "None us" in row]
    kinds = dict.fromkeys((row["chip"], row["mode"], row["grad"]) for row in told)
    for chip, mode, grad in kinds:
        points = [x for x in told if (x["chip"], x["mode"], x["grad"]) == (chip, mode, grad)]
        compute = sorted(x["compute of bare"] for x in points)
        behind = max(points, key=lambda x: x["of the best"])
        summary.append(
            {
                "chip": chip,
                "mode": mode,
                "with gradients": grad,
                "points": len(points),
                "compute of bare, median": compute[len(compute) // 2],
                "worst": compute[-1],
                "points that wait": sum(x["exposed us"] > 0.01 * x["None us"] for x in points),
                "None within 2 %": sum(x["of the best"] <= 1.02 for x in points),
                "None of the best, worst": behind["of the best"],
                "there": "{devices} devices, {tokens} tokens: {best}".format_map(behind),
            }
        )
    return summary


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)

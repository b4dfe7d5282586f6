"""Predicts ViT-22B's two projections over a grid of chips, axis sizes and tokens.

At each point: the bare product, what the cost model chooses, the plain collective, XLA's own
collective matmul and every schedule by name; forward, and with both gradients. What is asked is how
much the schedule adds to the product's own cycles, whether hops are hidden that could be, and how
far the choice is from the best way there is. Needs libtpu, and no TPU. Times are predictions.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from bench.asking import read
from bench.commands import UserError
from bench.predicted.baselines import XLA_COLLECTIVE_MATMUL
from bench.predicted.comparison import Row, aligned, tell, tried
from bench.predicted.keeping import keep
from bench.predicted.operations import Product
from bench.predicted.prediction import Prediction
from bench.predicted.programs import Program
from bench.predicted.slices import chip_of, compile_only, tpu_slice
from bench.record import load
from collective_matmul import algorithms, make_mesh
from collective_matmul.lanes import Lane

POINT = ("chip", "devices", "mode", "grad", "tokens")  # what says which point a row is
BARE, CHOSEN, PLAIN, XLA = "bare product", "None", "unfused", "unfused + XLA"
WALKERS = ("xla", "pallas_tpu")  # backends that follow an algorithm by name
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
    """folder for JSON, written after every point"""
    resume: bool = False
    """keeps the points that the JSON has already, and predicts what is asked for and missing"""


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
    known = _known(asked.out) if asked.resume and asked.out else {}
    points = [point for point in _points(asked) if tuple(point.values()) not in known]
    for point in points:
        known[tuple(point.values())] = point | _told(*_program(**point))
        if asked.out:
            _keep(asked, _ordered(known))
    summary = _summary(_ordered(known))
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


def _program(chip: str, devices: int, mode: str, grad: bool, tokens: int) -> tuple[Product, Mesh]:
    tell(f"{chip}, {devices} devices, {mode}, {tokens:,} tokens{', with gradients' * grad} ..")
    those = tpu_slice(next(where for n, where in SLICES[chip].items() if n >= devices))
    k, n = (WIDTH, INTO // devices) if mode == "gather" else (OUT_OF // devices, WIDTH)
    mesh = make_mesh(data=-1, tensor=devices, devices=those)
    return Product(mode, tokens, k, n, "bfloat16", grad), mesh


def _known(folder: pathlib.Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The points of a grid that was written into the folder, if there is one."""
    path = folder / "grid.json"
    rows = load(path).result["tables"][1]["rows"] if path.is_file() else []
    return {tuple(row[x] for x in POINT): row for row in rows}


def _ordered(known: Mapping[tuple[Any, ...], dict[str, Any]]) -> list[dict[str, Any]]:
    chips = list(SLICES)
    return [known[x] for x in sorted(known, key=lambda x: (chips.index(x[0]), *x[1:]))]


def _keep(asked: Options, rows: list[dict[str, Any]]) -> None:
    chip = chip_of(tpu_slice(next(iter(SLICES[asked.chips[0]].values()))))
    result = {
        "title": "ViT-22B's projections over a grid of chips, axis sizes and tokens",
        "order": 35,
        "tables": [
            {"title": "the worst point of each", "rows": _summary(rows)},
            {"title": "every point", "rows": rows},
        ],
    }
    assert asked.out is not None
    keep(asked.out, "grid", command="grid", options=asked, chip=chip, result=result, drawn=None)


def _told(product: Product, mesh: Mesh) -> dict[str, Any]:
    """What a point is asked for."""
    found = dict(_ways(product, mesh))
    bare, chosen, plain = found.get(BARE), found.get(CHOSEN), found.get(PLAIN)
    if bare is None or chosen is None or chosen.report is None or bare.report is None:
        return {"note": "does not compile"}
    others = {name: x for name, x in found.items() if name not in (BARE, CHOSEN)}
    best = min(others, key=lambda name: others[name].seconds or float("inf"))
    assert chosen.seconds is not None
    own = bare.report.compute_seconds
    return {
        "bare us": 1e6 * own,
        "None us": 1e6 * chosen.seconds,
        "compute of bare": chosen.report.compute_seconds / own,
        "exposed us": 1e6 * chosen.report.exposed_seconds,
        "best": best,
        "of the best": chosen.seconds / (others[best].seconds or float("inf")),
        "of the plain's memory": _share(chosen.temporary, plain.temporary if plain else None),
    }


def _ways(product: Product, mesh: Mesh) -> Iterator[tuple[str, Prediction]]:
    """What compiles; of algorithms that walk the same lanes here, the first."""
    t = mesh.shape["tensor"]
    made = {
        BARE: (functools.partial(product.bare, mesh), None),
        PLAIN: (functools.partial(product.program, mesh, None, PLAIN), None),
        XLA: (functools.partial(product.program, mesh, None, PLAIN), XLA_COLLECTIVE_MATMUL),
    }
    walked: list[tuple[Lane, ...]] = []
    for name in algorithms.names():
        lanes = algorithms.lanes(name, t)
        if lanes not in walked:
            walked.append(lanes)
            for backend in WALKERS:
                way = name if backend == "xla" else f"{name}, {backend}"
                made[way] = (functools.partial(product.program, mesh, name, backend), None)
    made[CHOSEN] = (functools.partial(product.program, mesh, None, None), None)
    done: dict[str, Row] = {}  # by program: what is chosen is often one of the others
    for name, (make, options) in made.items():
        try:
            program = make()
        except NotImplementedError:  # a kernel whose rows do not fit on the chip
            continue
        text = f"{program.traced.lower().as_text()} {options}"
        found = done[text] = done.get(text) or tried(
            name, functools.partial(_same, program), options
        )
        if isinstance(found, Prediction) and found.seconds and found.report:
            yield name, found


def _same(program: Program) -> Program:
    return program


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

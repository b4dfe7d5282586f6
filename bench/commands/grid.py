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

from bench.asking import read
from bench.commands import UserError
from bench.predicted.baselines import XLA_COLLECTIVE_MATMUL
from bench.predicted.comparison import aligned, tell, tried
from bench.predicted.keeping import keep
from bench.predicted.operations import Product
from bench.predicted.prediction import Prediction
from bench.predicted.slices import chip_of, compile_only, tpu_slice
from collective_matmul import algorithms, make_mesh
from collective_matmul.lanes import Lane

BARE, CHOSEN, PLAIN, XLA = "bare product", "None", "unfused", "unfused + XLA"
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
    """folder for JSON"""


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
    rows = list(_points(asked))
    summary = _summary(rows)
    heads = tuple(summary[0]) if summary else ()
    lines = [tuple(_cell(row[head]) for head in heads) for row in summary]
    print(f"{aligned([heads, *lines])}\n")
    if asked.out:
        chip = chip_of(tpu_slice(next(iter(SLICES[asked.chips[0]].values()))))
        result = {
            "title": "ViT-22B's projections over a grid of chips, axis sizes and tokens",
            "order": 35,
            "tables": [
                {"title": "the worst point of each", "rows": summary},
                {"title": "every point", "rows": rows},
            ],
        }
        keep(asked.out, "grid", command="grid", options=asked, chip=chip, result=result, drawn=None)
    return 0


def _points(asked: Options) -> Iterator[dict[str, Any]]:
    passes = (False,) if asked.forward_only else (False, True)
    for chip, t, mode, grad, m in itertools.product(
        asked.chips, asked.axis_sizes, ("gather", "scatter"), passes, asked.tokens
    ):
        devices = tpu_slice(next(where for n, where in SLICES[chip].items() if n >= t))
        mesh = make_mesh(data=-1, tensor=t, devices=devices)
        k, n = (WIDTH, INTO // t) if mode == "gather" else (OUT_OF // t, WIDTH)
        product = Product(mode, m, k, n, "bfloat16", grad)
        tell(f"{chip}, {t} devices, {mode}, {m:,} tokens{', with gradients' * grad} ..")
        where = {"chip": chip, "devices": t, "mode": mode, "grad": grad, "tokens": m}
        yield where | _told(product, mesh)


def _told(product: Product, mesh: Any) -> dict[str, Any]:
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


def _ways(product: Product, mesh: Any) -> Iterator[tuple[str, Prediction]]:
    """What compiles; of algorithms that walk the same lanes here, the first."""
    t = mesh.shape["tensor"]
    made = {
        BARE: (functools.partial(product.bare, mesh), None),
        CHOSEN: (functools.partial(product.program, mesh, None, None), None),
        PLAIN: (functools.partial(product.program, mesh, None, PLAIN), None),
        XLA: (functools.partial(product.program, mesh, None, PLAIN), XLA_COLLECTIVE_MATMUL),
    }
    walked: list[tuple[Lane, ...]] = []
    for name in algorithms.names():
        lanes = algorithms.lanes(name, t)
        if lanes not in walked:
            walked.append(lanes)
            made[name] = (functools.partial(product.program, mesh, name, "xla"), None)
    for name, (make, options) in made.items():
        found = tried(name, make, options)
        if isinstance(found, Prediction) and found.seconds and found.report:
            yield name, found


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

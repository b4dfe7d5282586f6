"""Predicts one collective product on TPUs that are not there: every algorithm on every backend.

Beside them the bare product, the plain collective, XLA's own collective matmul, and what the cost
model chooses; needs libtpu, and no TPU. Times are predictions.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from jax.sharding import Mesh

from bench.asking import read
from bench.commands import UserError
from bench.plans import plan_name, plans
from bench.predicted.baselines import XLA_COLLECTIVE_MATMUL
from bench.predicted.comparison import Failure, Row, aligned, as_dicts, tell, tried
from bench.predicted.compiling import Options as CompilerOptions
from bench.predicted.keeping import keep
from bench.predicted.operations import Product
from bench.predicted.prediction import Prediction, accuracy
from bench.predicted.programs import Program
from bench.predicted.slices import chip_of, compile_only, tpu_slice
from collective_matmul import make_mesh

BARE, CHOSEN, XLA = "bare product", "None", "unfused + XLA"
HEADS = (
    "",
    "us",
    "of bare",
    "of peak",
    "compute us",
    "exposed us",
    "copies us",
    "temp MiB",
    "hidden hops",
    "",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to predict."""

    mode: Literal["gather", "gather-contracting", "gather-rhs", "scatter"] = "gather"
    """which operand or result lies in shards; see bench/predicted/operations.py"""
    m: int = 16384
    """rows of the product of one device"""
    k: int = 6144
    """the contracted size of it"""
    n: int = 10752
    """its columns; by default, with k, ViT-22B's way into a block over 4 devices"""
    axis_size: int = 4
    """devices that exchange shards"""
    topology: str = "v5e:2x4"
    """the slice: CHIP:XxY or CHIP:XxYxZ, in chips"""
    dtype: str = "bfloat16"
    """of the operands"""
    grad: bool = False
    """compute both gradients too"""
    out: pathlib.Path | None = None
    """folder for JSON, and for the timeline and the trace of the best"""


def main(arguments: Sequence[str]) -> int:
    """Predicts, prints and writes."""
    asked = read(Options, "predict-op", __doc__, arguments)
    compile_only()
    devices = tpu_slice(asked.topology)
    chip, t = chip_of(devices), asked.axis_size
    try:
        product = Product(asked.mode, asked.m, asked.k, asked.n, asked.dtype, asked.grad)
        mesh = make_mesh(data=-1, tensor=t, devices=devices)
        told = product.explained(t, chip)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    rows = list(_rows(product, mesh))
    best = _best(rows)
    print(f"{_title(asked, len(devices))}\n\n{_table(rows, best)}\n")
    print(_verdict(rows, best))
    print(f"accuracy: {accuracy(chip)}\n\n{told}")
    if asked.out:
        keep(
            asked.out,
            "predict-op",
            command="predict-op",
            options=asked,
            chip=chip,
            result={"rows": as_dicts(rows)},
            drawn=best,
        )
    return 0 if best else 1


def _rows(product: Product, mesh: Mesh) -> Iterator[Row]:
    """The bare product, what None chooses, and every way that can be named."""

    def row(name: str, make: Callable[[], Program], options: CompilerOptions | None = None) -> Row:
        tell(f"{name} ..")
        return tried(name, make, options)

    yield row(BARE, functools.partial(product.bare, mesh))
    yield row(CHOSEN, functools.partial(product.program, mesh, None, None))
    yield row(XLA, functools.partial(product.program, mesh, None, "unfused"), XLA_COLLECTIVE_MATMUL)
    for backend, algorithm in plans():
        make = functools.partial(product.program, mesh, algorithm, backend)
        yield row(plan_name(backend, algorithm), make)


def _best(rows: Sequence[Row]) -> Prediction | None:
    """The fastest way that can be named in a call of this library."""
    ran = [row for row in rows if isinstance(row, Prediction) and row.seconds]
    named = [row for row in ran if row.name not in (BARE, CHOSEN, XLA)]
    return min(named, key=lambda row: row.seconds or 0.0) if named else None


def _verdict(rows: Sequence[Row], best: Prediction | None) -> str:
    """Whether what the cost model chooses is the best that can be named."""
    chosen = next((row for row in rows if row.name == CHOSEN), None)
    if best is None or not isinstance(chosen, Prediction) or not chosen.seconds:
        return "no way of this library compiles"
    assert best.seconds is not None
    ratio = chosen.seconds / best.seconds
    if ratio <= 1.005:
        return f"None chooses well: nothing that can be named beats it; the best is {best.name}"
    return f"None is NOT the best: {best.name} is predicted to take {1 / ratio:.1%} of its time"


def _table(rows: Sequence[Row], best: Prediction | None) -> str:
    bare = next((x.seconds for x in rows if isinstance(x, Prediction) and x.name == BARE), None)
    return aligned([HEADS, *(_cells(row, bare, row is best) for row in rows)])


def _cells(row: Row, bare: float | None, best: bool) -> tuple[str, ...]:
    if isinstance(row, Failure):
        return row.name, *("",) * (len(HEADS) - 2), f"failed: {row.reason}"
    if row.report is None or row.seconds is None:
        reason = str(row.out_of_memory or row.failure).partition("\n")[0]
        return row.name, *("",) * (len(HEADS) - 2), reason
    hops = [
        x
        for x in row.report.timeline.transfers
        if x.collective is not None and x.collective.kind == "collective-permute"
    ]
    hidden = sum(x.exposed <= 0.01 * (x.exposed + x.hidden) for x in hops)
    return (
        row.name,
        f"{1e6 * row.seconds:,.1f}",
        f"{row.seconds / bare:.2f}" if bare else "-",
        "-" if row.mfu is None else f"{row.mfu:.1%}",
        f"{1e6 * row.report.compute_seconds:,.1f}",
        f"{1e6 * row.report.exposed_seconds:,.1f}",
        f"{1e6 * row.report.copies_seconds:,.1f}",
        f"{(row.temporary or 0) / 2**20:,.1f}",
        f"{hidden} of {len(hops)}" if hops else "-",
        "; ".join([*(["the best"] if best else []), *row.notes]),
    )


def _title(asked: Options, devices: int) -> str:
    what = "the product and both gradients" if asked.grad else "forward"
    return (
        f"{asked.mode}, [{asked.m}, {asked.k}] x [{asked.k}, {asked.n}] on a device, "
        f"{asked.dtype}, over {asked.axis_size} of {devices} devices of {asked.topology}, {what}: "
        "predicted"
    )

"""Predictions that are written down, so that a change to the code or the compiler shows, with why.

The golden file holds the figures of a few programs for each TPU generation: products of every
generation, and two blocks of ViT-22B's width with their gradients. `compare` predicts them again.

Compiling is deterministic for one version of libtpu: on one machine and on another, the figures
agree to the last digit. `TOLERANCE` is for jax, whose versions lower the same program to slightly
different HLO. Another libtpu may schedule anything differently: its figures are shown beside the
golden ones, and not judged.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from bench.predicted import kernels
from bench.predicted.operations import Product
from bench.predicted.programs import Program, training_step
from bench.predicted.slices import SMALLEST, tpu_slice
from bench.tables import Row
from collective_matmul import Layout, make_mesh
from collective_matmul.inspect import OverlapReport
from models import vit
from models.config import Config
from models.optim import Optim

TOLERANCE = 0.02  # relative
NOTED = 1e-4  # of the step: a part that changes by less is not listed

# {chip: (the smallest slice with a ring of 4, columns of a device that hide a hop)}: peak / link
# bandwidth is 4.4 to 6.1 thousand on v4, v5e and v5p, 10 and 13 thousand on v6e and 7x.
SLICES = {
    "v4": (SMALLEST["v4"], 8192),
    "v5e": (SMALLEST["v5e"], 8192),
    "v5p": (SMALLEST["v5p"], 8192),
    "v6e": (SMALLEST["v6e"], 16384),
    "7x": (SMALLEST["7x"], 16384),
}
_ROWS, _WIDTH = 8192, 8192


@dataclasses.dataclass(frozen=True)
class Case:
    """A program of the golden file.

    Args:
      build: makes it.
      slow: compiling takes a minute or more.
    """

    build: Callable[[], Program]
    slow: bool = False


def product(chip: str, mode: str, algorithm: str | None, *, returned: bool = False) -> Program:
    """A collective product over 4 devices whose hops its compute can hide.

    Args:
      chip: of `SLICES`.
      mode: "gather" or "scatter".
      algorithm: its schedule; None: the plain collective.
      returned: as of `Product`.
    """
    topology, columns = SLICES[chip]
    mesh = make_mesh(data=-1, tensor=4, devices=tpu_slice(topology))
    sizes = (_ROWS, _WIDTH, columns) if mode == "gather" else (_ROWS, columns, _WIDTH)
    backend = "xla" if algorithm else "unfused"
    return Product(mode, *sizes, returned=returned).program(mesh, algorithm, backend)


def blocks(chip: str) -> Program:
    """A training step of 2 blocks of ViT-22B's width over 4 devices of a tensor axis, 8 images a
    chip."""
    devices = tpu_slice(SLICES[chip][0])
    mesh = make_mesh(data=-1, tensor=4, devices=devices)
    config = Config(
        model=vit.variant("22B/14", depth=2, remat="products"),
        optim=Optim(),
        steps=1000,
        batch=8 * len(devices),
        mesh=tuple(mesh.devices.shape),
    )
    return training_step(config, Layout(mesh, algorithm="two_way"))


CASES: Mapping[str, Case] = {
    **{
        f"{chip} {mode} {algorithm or 'unfused'}": Case(
            functools.partial(product, chip, mode, algorithm)
        )
        for chip in SLICES
        for mode in ("gather", "scatter")
        for algorithm in ("two_way", None)
    },
    **{f"{chip} ViT-22B blocks": Case(functools.partial(blocks, chip), True) for chip in SLICES},
}
"""{name: program}."""


def predict(case: Case) -> dict[str, Any]:
    """The figures of a case: seconds, bytes and FLOPs of one device, and the parts of the time.

    Raises:
      UserError: if the TPU compiler is not installed.
    """
    program = case.build()
    report, _ = kernels.overlap(program.traced.lower().compile(), program.mesh)
    return {
        "seconds": report.seconds,
        "compute": report.compute_seconds,
        "exposed": report.exposed_seconds,
        "flops": report.flops,
        "wire_bytes": report.wire_bytes,
        "hbm_peak": report.hbm_peak,
        "parts": _parts(report),
    }


def _parts(report: OverlapReport) -> dict[str, float]:
    """Seconds of the step by what they are spent on; of collectives what is exposed."""
    parts = {"waiting for copies from HBM": report.copies_seconds}
    for row in report.collectives:
        how = "asynchronous" if row.asynchronous else "synchronous"
        name = f"exposed: {how} {row.kind} over {row.axes}, {row.count} times"
        parts[name] = parts.get(name, 0.0) + row.exposed
    for op in report.ops:
        name = f"compute: {op.op_name or op.opcode}"
        parts[name] = parts.get(name, 0.0) + op.seconds
    least = NOTED * report.seconds
    return {name: seconds for name, seconds in parts.items() if seconds >= least}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, float]:
    """{figure: relative change} of the figures that left the tolerance."""
    found = {}
    for name in ("seconds", "compute", "exposed", "flops", "wire_bytes", "hbm_peak"):
        # What is exposed may be next to nothing: it is judged beside the whole step.
        base = old["seconds"] if name == "exposed" else old[name]
        change = (new[name] - old[name]) / base if base else float(bool(new[name]))
        if abs(change) > TOLERANCE:
            found[name] = change
    return found


def explain(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Row]:
    """Which parts of the time changed, the largest change first, as rows of a table."""
    names = {**old["parts"], **new["parts"]}
    rows = []
    for name in names:
        before, after = old["parts"].get(name, 0.0), new["parts"].get(name, 0.0)
        if abs(after - before) >= NOTED * old["seconds"]:
            rows.append(
                {
                    "part": name,
                    "golden us": before * 1e6,
                    "now us": after * 1e6,
                    "change us": (after - before) * 1e6,
                }
            )
    return sorted(rows, key=lambda row: -abs(row["change us"]))

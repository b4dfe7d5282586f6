"""Tells what the Pallas kernels of a compiled program take, by the compiler's schedule of each.

The program is a file of compiled HLO text, what `compiled.as_text()` returns. Every distinct kernel
is compiled alone by the TPU compiler; needs libtpu, and no TPU. Times are predictions.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated

import tyro

from bench.asking import read
from bench.commands import UserError
from bench.predicted.kernels import bundles
from bench.predicted.slices import SMALLEST, compile_only
from bench.tables import Row, markdown
from collective_matmul import hardware
from collective_matmul.hardware import Chip
from collective_matmul.inspect import kernels, overlap_report
from collective_matmul.inspect.timeline import Op


@dataclasses.dataclass(frozen=True)
class Options:
    """Which kernels."""

    program: Annotated[pathlib.Path, tyro.conf.Positional]
    """file of compiled HLO text"""
    chip: str
    """that it is compiled for: v4, v5e, v5p, v6e or 7x"""


def main(arguments: Sequence[str]) -> int:
    """Prints a row for every kernel, and why something is not known."""
    asked = read(Options, "kernels", __doc__, arguments)
    compile_only()
    if asked.chip not in SMALLEST:
        raise UserError(f"--chip {asked.chip}: write one of {', '.join(SMALLEST)}")
    chip = hardware.chip(asked.chip)
    try:
        text = asked.program.read_text(encoding="utf-8")
        issued, unknown = bundles(text, chip)
        ops = overlap_report(text, chip=chip, bundles=issued).timeline.ops
    except (OSError, ValueError) as error:
        raise UserError(f"{asked.program}: {error}") from error
    rows = [_row(op, chip, issued) for op in ops if kernels.is_pallas(op.instruction)]
    print(markdown(rows) or f"no Pallas kernel for TPU in {asked.program}")
    print("".join(f"\n{note}" for note in unknown))
    return 0


def _row(op: Op, chip: Chip, issued: Mapping[str, float]) -> Row:
    count, cost = issued.get(op.instruction.name), op.cost
    by_bytes = cost.bytes / chip.hbm_bandwidth
    bound = "bytes" if cost.seconds <= by_bytes else "bundles"
    rate = cost.flops / cost.seconds if cost.seconds else 0.0
    return {
        "kernel": op.instruction.name,
        "runs": op.count,
        "bundles": count,
        "us": 1e6 * cost.seconds if cost.seconds else None,
        "FLOPs": cost.flops or None,
        "bytes": cost.bytes,
        "% of peak": 100 * rate / cost.peak if rate and cost.peak else None,
        "bound": cost.how if count is None else bound,
    }

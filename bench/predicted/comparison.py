"""One training step partitioned in many ways: all predicted, in a table, with the winner.

A way that fails, or does not fit into memory, is a row that says so.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.predicted.baselines import Baseline
from bench.predicted.compiling import Options, gib
from bench.predicted.prediction import Prediction, predict
from bench.predicted.programs import Program

HEADS = (
    *("", "step ms", "MFU", "compute ms", "exposed ms", "copies ms", "hidden", "HBM GiB"),
    *("compile s", ""),
)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A way that could not be compiled, and why."""

    name: str
    reason: str


Row = Prediction | Failure


def compare(rows: Sequence[Baseline], program_of: Callable[[Baseline], Program]) -> list[Row]:
    """Predicts every row, one after the other; what happens is told on stderr.

    Args:
      rows: the ways.
      program_of: makes a row's program.
    """
    done: list[Row] = []
    for number, row in enumerate(rows, 1):
        tell(f"[{number}/{len(rows)}] {row.name}: {row.about} ..")
        found = tried(row.name, functools.partial(program_of, row), row.options)
        tell(f"    {_said(found)}")
        done.append(found)
    return done


def tried(name: str, make: Callable[[], Program], options: Options | None = None) -> Row:
    """A way's prediction, or why there is none: one that fails must not take others with it.

    Args:
      name: of the way.
      make: makes its program.
      options: the compiler's, by name.
    """
    try:
        return predict(name, make(), options)
    except Exception as error:  # whatever jax and the compiler raise
        return Failure(name, f"{type(error).__name__}: {error}".partition("\n")[0])


def tell(text: str) -> None:
    """A line about what is going on; results go to stdout, these to stderr."""
    print(text, file=sys.stderr, flush=True)


def winner(rows: Iterable[Row]) -> Prediction | None:
    """The row with the shortest step; None if there is no step at all."""
    ran = [row for row in rows if isinstance(row, Prediction) and row.seconds]
    return min(ran, key=lambda row: row.seconds or 0.0) if ran else None


def table(rows: Sequence[Row]) -> str:
    """The rows as text, the fastest first, those without a step last."""
    best = winner(rows)

    def order(row: Row) -> float:
        return (isinstance(row, Prediction) and row.seconds) or float("inf")

    ranked = sorted(rows, key=order)
    notes = [
        f"{row.name}: {note}" for row in ranked if isinstance(row, Prediction) for note in row.notes
    ]
    lines = aligned([HEADS, *(_cells(row, row is best) for row in ranked)])
    return "\n".join([lines, *(["", *notes] if notes else [])])


def aligned(lines: Sequence[tuple[str, ...]]) -> str:
    """Lines of cells in columns: names and remarks, first and last, from the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, len(line) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, as JSON takes them."""
    return [
        {"name": row.name, "failure": row.reason} if isinstance(row, Failure) else row.as_dict()
        for row in rows
    ]


def _cells(row: Row, best: bool) -> tuple[str, ...]:
    blank = ("",) * 6
    if isinstance(row, Failure):
        return row.name, *blank, "", "", f"failed: {row.reason}"
    built = f"{row.compile_seconds:.0f}"
    if row.out_of_memory:
        used, limit = row.out_of_memory.used, row.out_of_memory.limit
        note = f"OOM: needs {gib(used)}, the device has {gib(limit)}"
        return row.name, *blank, f"{used / 2**30:.1f}", built, note
    if row.report is None or row.seconds is None:
        return row.name, *blank, "", built, f"failed: {row.failure}"
    return (
        row.name,
        f"{1e3 * row.seconds:,.2f}",
        "-" if row.mfu is None else f"{row.mfu:.1%}",
        f"{1e3 * row.report.compute_seconds:,.2f}",
        f"{1e3 * row.report.exposed_seconds:,.2f}",
        f"{1e3 * row.report.copies_seconds:,.2f}",
        f"{row.report.hidden_share:.0%}",
        "-" if row.hbm is None else f"{row.hbm / 2**30:.1f}",
        built,
        f"{_axes(row)}{'; the winner' * best}",
    )


def _axes(row: Prediction) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in row.mesh.items())


def _said(row: Row) -> str:
    if isinstance(row, Failure):
        return f"failed: {row.reason}"
    if row.out_of_memory:
        return str(row.out_of_memory).partition("\n")[0]
    if row.seconds is None:
        return f"failed: {row.failure}"
    mfu = "" if row.mfu is None else f", MFU {row.mfu:.1%}"
    return f"predicted {1e3 * row.seconds:,.2f} ms{mfu} ({row.compile_seconds:.0f} s to compile)"

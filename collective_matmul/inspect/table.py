"""A report as a table for a terminal, at most 100 columns wide."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collective_matmul.inspect.report import OverlapReport

WIDTH = 100
OPS = 12  # compute instructions that are shown,
ORIGINS = 8  # and operations that the rest comes from
NOTHING = 5e-10  # s, and less is shown as 0
_SCALES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def text(report: OverlapReport) -> str:
    """The report as lines.

    Args:
      report: what to print.
    """
    blocks = [_head(report), _collectives(report), _ops(report), _uncosted(report)]
    blocks.append(_wrap("\n".join(f"note: {remark}" for remark in report.remarks)))
    return "\n\n".join(block for block in blocks if block)


def duration(seconds: float) -> str:
    """A time with a unit that suits it: "3.21 ms"."""
    if math.isnan(seconds):
        return "?"
    if seconds < NOTHING:
        return "0"
    scale, unit = unit_of(seconds)
    return f"{seconds / scale:,.3g} {unit}" if seconds < 1000 * scale else f"{seconds:,.0f} s"


def unit_of(seconds: float) -> tuple[float, str]:
    """The unit that suits a time: seconds of one of it, and its name."""
    return next(((scale, unit) for scale, unit in _SCALES if seconds >= scale), _SCALES[-1])


def percent(share: float | None) -> str:
    """A share, or a dash where there is none."""
    return "-" if share is None or math.isnan(share) else f"{share:.0%}"


def amount(n: float, unit: str) -> str:
    """A number with a prefix: "12.3 GB"."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= scale:
            return f"{n / scale:.3g} {prefix}{unit}"
    return f"{n:.3g} {unit}"


def _head(report: OverlapReport) -> str:
    mesh = ", ".join(f"{axis}={size}" for axis, size in report.axes.items())
    clock = f", clock {report.clock / 1e9:.2f} GHz" if report.clock else ""
    devices = f"{report.partitions:,} x {report.chip.name}"
    lines = [f"predicted, not measured: one of {devices} ({mesh}){clock}"]
    if report.timed:
        lines.append(
            f"step {duration(report.seconds)} = compute {duration(report.compute_seconds)} + "
            f"exposed communication {duration(report.exposed_seconds)} + HBM copies "
            f"{duration(report.copies_seconds)}"
        )
        total = report.exposed_seconds + report.hidden_seconds
        if total:
            lines.append(
                f"communication {duration(total)}, of which {report.hidden_share:.1%} is hidden; "
                f"a device sends {amount(report.wire_bytes, 'B')}"
            )
    else:
        lines.append(f"a device sends {amount(report.wire_bytes, 'B')}")
    lines.append(_products(report))
    if report.hbm_peak is not None:
        limit = f" of {report.hbm_limit / 2**30:.2f}" if report.hbm_limit else ""
        lines.append(f"HBM {report.hbm_peak / 2**30:.2f}{limit} GiB")
    return _wrap("\n".join(lines))


def _products(report: OverlapReport) -> str:
    line = f"products {amount(report.flops, 'FLOP')} a device"
    if report.repeated_flops > 0.005 * report.flops:
        line += f" ({amount(report.repeated_flops, 'FLOP')} of them done twice by the compiler)"
    if not report.timed:
        return line
    seconds = sum(op.seconds for op in report.ops if op.flops)
    line += f", {duration(seconds)}"
    ideal = sum(op.seconds * op.peak_share for op in report.ops if op.peak_share)
    if ideal and seconds:
        line += f" at {ideal / seconds:.1%} of peak ({ideal / report.seconds:.1%} over the step)"
    rest = max(0.0, report.compute_seconds - seconds)
    return f"{line}\nother compute {duration(rest)}{_rest(report)}"


def _rest(report: OverlapReport) -> str:
    """The compute without products, by the operation of the program that it comes from."""
    origins: dict[str, float] = {}
    for op in report.ops:
        if not op.flops:
            name = op.op_name.rpartition("/")[2] or op.opcode
            origins[name] = origins.get(name, 0.0) + op.seconds
    shown = sorted(origins.items(), key=lambda item: -item[1])[:ORIGINS]
    told = ", ".join(f"{name} {duration(t)}" for name, t in shown if t >= NOTHING)
    return f": {told}" if told else ""


def _collectives(report: OverlapReport) -> str:
    if not report.collectives:
        return "no collectives"
    head = ("collective", "along", "async", "count", "sent", "time", "exposed", "hidden", "")
    rows = [
        (
            row.kind,
            row.axes or "-",
            "yes" if row.asynchronous else "no",
            f"{row.count:,}",
            amount(row.wire_bytes, "B"),
            duration(row.seconds),
            duration(row.exposed),
            duration(row.hidden),
            percent(row.hidden / row.seconds if row.seconds else None),
        )
        for row in report.collectives
    ]
    return _table([head, *rows], left=3)


def _ops(report: OverlapReport) -> str:
    if not report.timed or not report.ops:
        return ""
    shown = [op for op in report.ops[:OPS] if op.seconds >= NOTHING]
    head = ("costliest compute", "runs", "time", "step", "peak", "HBM", "from")
    rows = [
        (
            op.name[:30],
            f"{op.count:,}",
            duration(op.seconds),
            f"{op.seconds / report.seconds:.1%}",
            percent(op.peak_share),
            percent(op.hbm_share),
            _origin(op.op_name),
        )
        for op in shown
    ]
    lines = _table([head, *rows], left=1, last_left=True)
    rest = report.compute_seconds - sum(op.seconds for op in shown)
    return f"{lines}\nand {len(report.ops) - len(shown):,} more, {duration(max(0.0, rest))}"


def _uncosted(report: OverlapReport) -> str:
    if not report.uncosted:
        return ""
    head = ("NOT COSTED", "runs", "largest", "result", "why")
    rows = [
        (row.what, f"{row.count:,}", amount(row.largest, "B"), row.shape, row.why)
        for row in report.uncosted
    ]
    return _table([head, *rows], left=1, last_left=True)


def _origin(op_name: str) -> str:
    """The end of an op_name, which tells most: the last parts that fit."""
    parts = [part for part in op_name.split("/") if part not in ("while", "body", "closed_call")]
    kept = ""
    for part in reversed(parts):
        longer = f"{part}/{kept}" if kept else part
        if len(longer) > 40:
            break
        kept = longer
    return kept


def _table(rows: Iterable[Sequence[str]], left: int, last_left: bool = False) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width)
            if i < left or (last_left and i == len(row) - 1)
            else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip()[:WIDTH])
    return "\n".join(lines)


def _wrap(paragraphs: str) -> str:
    """Lines of at most `WIDTH`; what continues a line is indented."""
    wrap = functools.partial(textwrap.fill, width=WIDTH, subsequent_indent="  ")
    return "\n".join(wrap(line) for line in paragraphs.splitlines())

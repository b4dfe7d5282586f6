"""The report on a compiled program: its predicted step, and the communication that is exposed."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from collective_matmul.hardware import Chip
from collective_matmul.inspect import draw as drawing
from collective_matmul.inspect import table
from collective_matmul.inspect import trace as tracing
from collective_matmul.inspect.reconcile import check
from collective_matmul.inspect.rows import CollectiveRow, OpRow, Uncosted
from collective_matmul.inspect.timeline import Timeline


@dataclasses.dataclass(frozen=True)
class OverlapReport:
    """What `overlap_report` found; `print` it for a table. Times are predicted seconds of a device.

    Where nothing is published of the chip (a CPU), times are nan; counts, bytes and FLOPs hold.

    Args:
      chip: whose rates were used.
      partitions: devices that run the program.
      axes: {mesh axis: size}.
      clock: Hz that the compiler's cycles were divided by.
      seconds: the whole program: compute, exposed and copies.
      compute_seconds: the device computes.
      exposed_seconds: it waits for collectives.
      copies_seconds: it waits for copies between HBM and on-chip memory.
      hidden_seconds: of collectives, under compute.
      collectives: by kind and axes, the most exposed first.
      ops: compute instructions, the costliest first.
      flops: of the products, per device.
      repeated_flops: of these, of products that the compiler put into the program more than once.
      wire_bytes: that a device sends.
      hbm_peak: bytes, as the compiler planned them; None if only text was given.
      hbm_limit: bytes of the chip's memory; None: unknown.
      uncosted: what counts no time because nothing is known of it.
      remarks: what was assumed, and what cannot be told.
      timeline: all of it, event by event.
    """

    chip: Chip
    partitions: int
    axes: dict[str, int]
    clock: float | None
    seconds: float
    compute_seconds: float
    exposed_seconds: float
    copies_seconds: float
    hidden_seconds: float
    collectives: tuple[CollectiveRow, ...]
    ops: tuple[OpRow, ...]
    flops: int
    repeated_flops: int
    wire_bytes: float
    hbm_peak: int | None
    hbm_limit: float | None
    uncosted: tuple[Uncosted, ...]
    remarks: tuple[str, ...]
    timeline: Timeline = dataclasses.field(repr=False)

    @property
    def timed(self) -> bool:
        """Whether times are told."""
        return not math.isnan(self.seconds)

    @property
    def hidden_share(self) -> float:
        """Of the time that collectives take; 1 where there are none."""
        total = self.exposed_seconds + self.hidden_seconds
        return self.hidden_seconds / total if total else 1.0

    def __str__(self) -> str:
        return table.text(self)

    def as_dict(self, ops: int | None = 40) -> dict[str, Any]:
        """Everything but the timeline, as JSON takes it; a time that is not told is None.

        Args:
          ops: how many of the costliest compute instructions; None for all.
        """
        fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        del fields["timeline"]
        fields["chip"] = self.chip.name
        fields["hidden_share"] = self.hidden_share
        fields["ops"] = self.ops[:ops]
        for name in ("collectives", "ops", "uncosted"):
            fields[name] = [dataclasses.asdict(row) for row in fields[name]]
        fields["remarks"] = list(self.remarks)
        return {name: _json(value) for name, value in fields.items()}

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Writes the timeline as a picture (needs matplotlib).

        Args:
          path: of the PNG file.
        """
        drawing.draw(self.timeline, path, self._title())

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the timeline as a trace that ui.perfetto.dev and chrome://tracing open.

        Args:
          path: of the JSON file.
        """
        tracing.trace(self.timeline, path, self._title())

    def _title(self) -> str:
        """One line.

        Raises:
          ValueError: if no time is told.
        """
        if not self.timed:
            raise ValueError(
                f"{self.chip.name} has no published rates, so there is no timeline; pass chip= to "
                "overlap_report for the timeline of this program on another chip"
            )
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.axes.items())
        return (
            f"predicted: {self.partitions:,} x {self.chip.name} ({mesh}), "
            f"step {table.duration(self.seconds)}, {self.exposed_seconds / self.seconds:.1%} of it "
            f"exposed communication, {self.hidden_share:.0%} of communication hidden"
        )

    def reconcile(
        self,
        flops: float | None = None,
        wire_bytes: float | None = None,
        tolerance: float = 0.005,
    ) -> OverlapReport:
        """Checks that the report found what the program is known to hold.

        Args:
          flops: of the products, of all devices together (`bench.flops.count(...).flops`). What
            the compiler does twice is counted once.
          wire_bytes: that one device sends.
          tolerance: relative.

        Returns:
          The report itself.

        Raises:
          ReconciliationError: with both numbers, if they are further apart.
        """
        if flops is not None:
            distinct = self.flops - self.repeated_flops
            check("FLOPs on all devices", distinct * self.partitions, flops, tolerance)
        if wire_bytes is not None:
            check("bytes that a device sends", self.wire_bytes, wire_bytes, tolerance)
        return self


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_json(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value

"""What a simulated run consists of: events in lanes, loops, and the sums of each instruction."""

from __future__ import annotations

import dataclasses

from collective_matmul.inspect.collectives import Collective
from collective_matmul.inspect.costs import Cost
from collective_matmul.inspect.hlo import Instruction
from collective_matmul.inspect.network import Traffic

COMPUTE, COPIES = "compute", "HBM copies"  # lanes; those of the network are called after mesh axes
PRODUCT, OTHER, WAIT, COPY = "product", "other", "wait", "copy"  # kinds, as "all-gather" is one


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that takes time; `start` counts from that of its timeline. Times in seconds."""

    lane: str
    name: str
    kind: str
    start: float
    seconds: float
    op_name: str = ""


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop: its body's timeline stands for each of its trips."""

    name: str
    start: float
    trips: int
    body: Timeline

    @property
    def seconds(self) -> float:
        """Of all trips."""
        return self.trips * self.body.seconds


@dataclasses.dataclass(frozen=True)
class Op:
    """What a compute instruction adds up to: `count` runs."""

    instruction: Instruction
    cost: Cost
    count: int

    @property
    def seconds(self) -> float:
        """Of all runs."""
        return self.count * self.cost.seconds


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What a transfer adds up to, all runs together; times in seconds.

    Args:
      instruction: its start, or itself where it has none.
      collective: None for a copy between memories.
      traffic: of one run; None for a copy.
      asynchronous: it has a start and a done.
      count: runs.
      exposed: time that the device waits for it.
      hidden: time that it passes under compute.
    """

    instruction: Instruction
    collective: Collective | None
    traffic: Traffic | None
    asynchronous: bool
    count: int
    exposed: float
    hidden: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A run of a computation on one device, predicted; times in seconds.

    Args:
      seconds: from the first instruction to the last.
      events: what takes time outside of loops.
      loops: the loops directly in it.
      ops: every compute instruction, those in loops as often as they run.
      transfers: every transfer, likewise.
      remarks: what was taken to be so on the way.
    """

    seconds: float
    events: tuple[Event, ...] = ()
    loops: tuple[Loop, ...] = ()
    ops: tuple[Op, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    remarks: tuple[str, ...] = ()

    def times(self, runs: int) -> tuple[tuple[Op, ...], tuple[Transfer, ...]]:
        """What so many runs of it add up to."""
        ops = tuple(dataclasses.replace(op, count=runs * op.count) for op in self.ops)
        transfers = tuple(
            dataclasses.replace(
                x, count=runs * x.count, exposed=runs * x.exposed, hidden=runs * x.hidden
            )
            for x in self.transfers
        )
        return ops, transfers

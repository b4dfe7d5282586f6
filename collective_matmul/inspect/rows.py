"""The rows of a report: what a timeline adds up to, by collective and axis, and by instruction."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from collective_matmul.hardware import Chip
from collective_matmul.inspect import kernels
from collective_matmul.inspect.collectives import wire_bytes
from collective_matmul.inspect.hlo import Instruction
from collective_matmul.inspect.timeline import Op, Timeline, Transfer


@dataclasses.dataclass(frozen=True)
class CollectiveRow:
    """All collectives of a kind along the same mesh axes; times in seconds, predicted.

    Args:
      kind: as HLO names it: "collective-permute", "all-gather".
      axes: mesh axes, "tensor" or "data,fsdp".
      asynchronous: whether it has a start and a done, so that something can hide it.
      count: how many run in a step.
      wire_bytes: that a device sends in a step.
      seconds: exposed + hidden.
      exposed: the device waits for it.
      hidden: it passes under compute.
    """

    kind: str
    axes: str
    asynchronous: bool
    count: int
    wire_bytes: float
    seconds: float
    exposed: float
    hidden: float


@dataclasses.dataclass(frozen=True)
class OpRow:
    """A compute instruction; `seconds` and `flops` are those of all its runs in a step.

    Args:
      name: in the HLO text.
      op_name: where it comes from in the program.
      opcode: as HLO names it.
      count: how often it runs in a step.
      seconds: predicted.
      flops: of its products.
      peak_share: its FLOP/s over the chip's peak; None without products, or without a peak.
      hbm_share: its bytes/s over the memory's bandwidth.
      how: what its cost is from (`inspect.costs`).
    """

    name: str
    op_name: str
    opcode: str
    count: int
    seconds: float
    flops: int
    peak_share: float | None
    hbm_share: float | None
    how: str


@dataclasses.dataclass(frozen=True)
class Uncosted:
    """What the report knows no cost of, so that it counts no time.

    Args:
      what: an opcode, the target of a custom call, a collective.
      count: how often it runs in a step.
      largest: the largest result among them, in bytes.
      shape: of that result.
      why: why there is no cost.
    """

    what: str
    count: int
    largest: int
    shape: str
    why: str


def collective_rows(timeline: Timeline) -> tuple[CollectiveRow, ...]:
    """The collectives of a timeline, the most exposed first."""
    found: dict[tuple[str, str, bool], list[float]] = {}
    for x in timeline.transfers:
        if x.collective is None or x.traffic is None:
            continue
        key = (x.collective.kind, x.traffic.route.axes, x.asynchronous)
        total = found.setdefault(key, [0, 0.0, 0.0, 0.0])
        for i, value in enumerate(
            (x.count, x.count * wire_bytes(x.collective), x.exposed, x.hidden)
        ):
            total[i] += value
    rows = (
        CollectiveRow(*key, int(count), sent, exposed + hidden, exposed, hidden)
        for key, (count, sent, exposed, hidden) in found.items()
    )
    return tuple(sorted(rows, key=lambda row: (-row.exposed, -row.seconds)))


def op_rows(timeline: Timeline, chip: Chip) -> tuple[OpRow, ...]:
    """The compute instructions of a timeline, the costliest first."""
    return tuple(
        OpRow(
            name=op.instruction.name,
            op_name=op.instruction.op_name,
            opcode=op.instruction.opcode,
            count=op.count,
            seconds=op.seconds,
            flops=op.count * op.cost.flops,
            peak_share=_share(op, op.cost.flops, op.cost.peak),
            hbm_share=_share(op, op.cost.bytes, chip.hbm_bandwidth),
            how=op.cost.how,
        )
        for op in sorted(timeline.ops, key=lambda op: -op.seconds)
        if op.cost.how != "unknown"
    )


def uncosted_rows(timeline: Timeline) -> tuple[Uncosted, ...]:
    """What took no time because nothing is known of it, the largest first."""
    found: dict[tuple[str, str], Uncosted] = {}
    for count, instruction, why in _unknown(timeline):
        called = kernels.target(instruction)
        name = called if "(" not in called else ""  # the compiler's note to itself names nothing
        what = f"{instruction.opcode} {name}".rstrip()
        array = max(instruction.result, key=lambda x: x.bytes, default=None)
        size = array.bytes if array else 0
        shape = f"{array.dtype}[{','.join(map(str, array.shape))}]" if array else ""
        old = found.get((what, why), Uncosted(what, 0, -1, "", why))
        new = dataclasses.replace(old, count=old.count + count)
        if size > old.largest:
            new = dataclasses.replace(new, largest=size, shape=shape)
        found[what, why] = new
    return tuple(sorted(found.values(), key=lambda row: -row.largest))


def _unknown(timeline: Timeline) -> Iterable[tuple[int, Instruction, str]]:
    for op in timeline.ops:
        if op.cost.how == "unknown":
            yield op.count, op.instruction, "no cycles, FLOPs or bytes are declared"
    for x in timeline.transfers:
        if x.traffic is not None and x.traffic.route.unknown:
            yield x.count, x.instruction, x.traffic.route.unknown


def _share(op: Op, amount: int, rate: float | None) -> float | None:
    if not rate or not amount or not op.cost.seconds:
        return None
    return amount / op.cost.seconds / rate


def waits_for_copies(transfers: Iterable[Transfer]) -> float:
    """Seconds that the device waits for copies between HBM and on-chip memory."""
    return sum((x.exposed for x in transfers if x.collective is None), 0.0)

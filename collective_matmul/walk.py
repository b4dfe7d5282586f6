"""How long a decomposed plan takes: round by round, what computes and what waits.

A product takes the root of the sum of two squares: its FLOPs at the rate that the compiler's
products reach, its sizes padded to the 128 rows and columns of a matrix unit, and its bytes at the
memory's bandwidth, which pass beside them only in part. An operand that every chunk meets is read
once if the chip can keep it. A hop takes the permute's latency and its bytes at one link's
bandwidth. A product waits for its chunk, a hop for the sum that it carries.

Three constants of the model come from the TPU compiler's cycle estimates for 8192 x 6144 x 24576
over 8 devices of v5e. Adding to an accumulator costs one pass over it beside the product (7 such
steps: 1.29 Mcycles modelled, 1.33 estimated). A sum that is not added within the product costs one
read of it, one of what arrived and one write (92 kcycles modelled, 110 estimated). A chunk's copy
into the assembled operand costs five passes (115 kcycles modelled, 114 estimated).

What the compiler leaves exposed of a scatter's hops comes from its schedules of 16384 x 7680 x 6144
over 4 devices of v4, v5e, v5p, v6e and 7x. A sum is added within the next product, which so waits
for the hop that brings it. With one lane of several hops the last product waits for the last one (1
of the ring's 3 on each chip), and over more devices for about half of all; with lanes of different
lengths another lane's sum has arrived already (two_way: 0 to 0.07 of the wire, on 7x 0.35). Lanes
that move in step wait for each other: bidirectional exposes 0.40 to 0.57 of its wire, on v5e
nothing.
`python -m bench predict-op --mode scatter` shows it.
"""

from __future__ import annotations

import math

from collective_matmul import hardware
from collective_matmul.lanes import Lane, Part, link_load, rounds, steps
from collective_matmul.operation import Operation, Plan, Term, accumulation_dtype

OF_PEAK = {
    "v4": (0.95, 0.92),
    "v5e": (0.98, 0.86),
    "v5p": (0.97, 0.89),
    "v6e": (0.88, 0.68),
    "7x": (0.92, 0.80),
}
"""What share of the chip's peak the compiler's products reach by its own cycles, as far as FLOPs
bound them: with an operand that stays on the chip, and with windows of both read again and again.
16,384 x 6,144 x 5,376 takes 1,328 us on v6e and twice the columns 3,445, of 1,179 and 2,358 at the
peak (`python -m bench grid`). The second bounds such a product's time from below, whatever its
bytes.
"""
MATRIX_UNIT = 128  # rows and columns that a product's sizes are padded to, on TPU and Hopper alike
IN_STEP = 0.5  # of the wire that a scatter exposes whose lanes move in step, for several rounds
LATE = ("v4", "v5p", "v6e")
"""Chips on which the compiler starts a hop one product late, because it takes it to be faster than
a link is. Of two lanes each then waits while the other multiplies: 16,384 x 6,144 over 16 devices
of v4 exposes 1,122 us by two_way, 156 us if told otherwise (docs/performance.md)."""
COPY_PASSES = 5  # reads and writes that copying a chunk into a larger buffer costs


def gather(op: Operation, plan: Plan, chip: hardware.Chip) -> tuple[float, float]:
    """Seconds of compute, and of waiting: every arrival's product waits for its chunk."""
    late = [x for x in op.terms if plan.fat and op.letter not in x.spec.out]
    now = [x for x in op.terms if x not in late]

    def arrival(part: Part) -> float:
        rows = op.shard_size // part.count
        copied = op.travelling.nbytes / part.count if late else 0
        copy = COPY_PASSES * copied / chip.hbm_bandwidth
        return copy + sum(product_time(op, x, rows, chip) for x in now)

    compute = clock = arrival(Part())
    wire = 0.0
    for hop, moving in rounds(plan.lanes):
        for i, after in _landing(op, plan.lanes, hop, moving, chip):
            work = arrival(plan.lanes[i].part)
            clock, compute = max(clock, wire + after) + work, compute + work
        wire += hop_time(op, plan.lanes, hop, chip)
        if len(moving) > 1 and chip.name in LATE:
            wire += arrival(plan.lanes[moving[0]].part)
    tail = sum(product_time(op, x, op.shard_size * op.t, chip) for x in late)
    return compute + tail, clock - compute


def scatter(op: Operation, plan: Plan, chip: hardware.Chip) -> tuple[float, float]:
    """Seconds of compute, and of waiting: every hop waits for the sum that it carries.

    Where lanes move side by side, sums are added within the products, else in passes of their own.
    """
    wire_dtype, out = op.travelling.dtype, op.terms[0].out
    sums = accumulation_dtype(op.terms[0].lhs.dtype, out.dtype)
    addition = math.prod(out.shape) * (sums.itemsize + 2 * wire_dtype.itemsize) / chip.hbm_bandwidth
    compute = clock = wire = 0.0
    landed: dict[int, float] = {}
    in_step = len(plan.lanes) > 1 and len({x.hops for x in plan.lanes}) == 1
    for hop, moving in reversed(list(rounds(plan.lanes))):
        adds = addition if len(moving) == 1 and hop < steps(plan.lanes) else 0.0
        for i in sorted(moving, key=lambda i: landed.get(i, 0.0)):
            n = plan.lanes[i].part.count
            work = products_time(op, op.shard_size // n, chip) + adds / n
            if len(moving) > 1:  # the product adds the sum that has landed, and so waits for it
                clock = max(clock, landed.get(i, 0.0))
            clock, compute = clock + work, compute + work
            if chip.switched:
                wire = max(clock, wire) + _transfer(op, 1 / n / chip.links, chip)
            flight = hop_time(op, _same_way(op, plan.lanes, i), hop, chip)
            late = len(moving) > 1 and work < flight and chip.name in LATE
            landed[i] = clock + flight + work * late
        if not chip.switched:
            if len(moving) == 1:
                clock = max(clock, wire)
            wire = max(wire, *(landed[i] for i in moving))
    home = sum(addition / lane.part.count for lane in plan.lanes)
    own = products_time(op, op.shard_size, chip) + home
    if len(plan.lanes) == 1 and plan.lanes[0].hops > 1:
        clock = max(clock, wire)
    exposed = max(clock + own, wire) - (compute + own)
    if (in_step and steps(plan.lanes) > 1) or (len(plan.lanes) == 1 and steps(plan.lanes) > 3):
        exposed += IN_STEP * sum(
            hop_time(op, plan.lanes, hop, chip) for hop, _ in rounds(plan.lanes)
        )
    return compute + own, exposed


def _same_way(op: Operation, lanes: tuple[Lane, ...], i: int) -> tuple[Lane, ...]:
    """The lanes that cross links in the direction of lane i."""
    ahead = [2 * (lane.shift % op.t) <= op.t for lane in lanes]
    return tuple(lane for lane, way in zip(lanes, ahead, strict=True) if way == ahead[i])


def _landing(
    op: Operation, lanes: tuple[Lane, ...], hop: int, moving: list[int], chip: hardware.Chip
) -> list[tuple[int, float]]:
    """`(lane, seconds after the round began)` of every chunk: through a switch, one by one."""
    if not chip.switched:
        return [(i, hop_time(op, lanes, hop, chip)) for i in moving]
    landed, times = 0.0, []
    for i in moving:
        landed += _transfer(op, 1 / lanes[i].part.count / chip.links, chip)
        times.append((i, landed))
    return times


def filled_time(op: Operation, rows: int, chip: hardware.Chip) -> float:
    """Seconds of the products for `rows` rows whose results hold the letter."""
    now = (x for x in op.terms if op.letter in x.spec.out)
    return sum(product_time(op, x, rows, chip) for x in now)


def hop_time(op: Operation, lanes: tuple[Lane, ...], hop: int, chip: hardware.Chip) -> float:
    """Seconds of round `hop`."""
    if chip.switched:
        moving = [lane for lane in lanes if lane.hops >= hop]
        return sum(_transfer(op, 1 / lane.part.count / chip.links, chip) for lane in moving)
    farthest = max(min(x.shift % op.t, -x.shift % op.t) for x in lanes if x.hops >= hop)
    further = (farthest - 1) * chip.hop_latency
    return further + _transfer(op, busiest(op, lanes, hop, chip), chip)


def _transfer(op: Operation, shards: float, chip: hardware.Chip) -> float:
    return chip.permute_latency + shards * op.travelling.nbytes / chip.link_bandwidth


def busiest(op: Operation, lanes: tuple[Lane, ...], hop: int, chip: hardware.Chip) -> float:
    """Shards on the busiest link in round `hop`: of two chips both ways around are the same."""
    loads = link_load(lanes, op.t, hop)
    chips = op.t // chip.devices_per_chip
    if chips < 2:
        return max(loads) / hardware.IN_CHIP
    return sum(loads) if chips == 2 else max(loads)


def products_time(op: Operation, rows: int, chip: hardware.Chip) -> float:
    """Seconds of all terms' products for `rows` rows of the moving letter."""
    return sum(product_time(op, term, rows, chip) for term in op.terms)


def flops(op: Operation, rows: int) -> int:
    """FLOPs of the same."""
    return sum(2 * math.prod(_sizes(op, term, rows)) for term in op.terms if term.rhs)


def _sizes(op: Operation, term: Term, rows: int) -> tuple[int, int, int, int]:
    """Batch, rows, contracted and columns of a term's product over `rows` of the moving letter."""
    sizes = dict(zip(term.spec.lhs, term.lhs.shape, strict=True))
    sizes |= dict(zip(term.spec.rhs or "", term.rhs.shape if term.rhs else (), strict=True))
    sizes[op.letter] = rows

    def total(letters: str, role: str) -> int:
        return math.prod(sizes[x] for x in letters if term.spec.role(x) == role)

    lhs, rhs = term.spec.lhs, term.spec.rhs or ""
    return total(lhs, "batch"), total(lhs, "free"), total(lhs, "contracted"), total(rhs, "free")


def product_time(
    op: Operation, term: Term, rows: int, chip: hardware.Chip, *, in_hbm: bool = False
) -> float:
    """Seconds of one product, or of the copy that stands for it in a bare collective.

    Args:
      op, term: the product.
      rows: of the moving letter.
      chip: on which.
      in_hbm: the moved operand is what a kernel made, which the compiler does not keep on the chip:
        the weight gradient of 2,048 x 6,144 x 10,752 takes 544 us on v6e, and else some 400.
    """
    batch, m, k, n = _sizes(op, term, rows)
    if term.rhs is None:
        return COPY_PASSES * batch * m * k * term.lhs.dtype.itemsize / chip.hbm_bandwidth
    padded = [-(-size // MATRIX_UNIT) * MATRIX_UNIT for size in (m, k, n)]
    wide = accumulation_dtype(term.lhs.dtype, term.rhs.dtype, term.out.dtype)
    slower = max(term.lhs.dtype, term.rhs.dtype, key=lambda dtype: dtype.itemsize)
    rate = hardware.planning_rate(chip, slower)
    reads = (
        (term.spec.lhs, m * k * term.lhs.dtype.itemsize),
        (term.spec.rhs or "", k * n * term.rhs.dtype.itemsize),
    )
    pieces = rows < op.shard_size * op.t
    kept = [x <= chip.kept and not (in_hbm or (pieces and op.letter in y)) for y, x in reads]
    again = (x for (_, x), stays in zip(reads, kept, strict=True) if not (pieces and stays))
    traffic = m * n * term.out.dtype.itemsize + sum(again)
    accumulates = pieces and op.letter not in term.spec.out
    extra = 2 * m * n * wide.itemsize if accumulates else 0  # written, and read to be added
    with_one_kept, in_windows = OF_PEAK.get(chip.name, (1.0, 1.0))
    at_peak = 2 * math.prod(padded) / rate
    roofline = math.hypot(at_peak / with_one_kept, traffic / chip.hbm_bandwidth)
    if not any(kept):
        roofline = max(roofline, at_peak / in_windows)
    launch = chip.permute_latency  # v5e: 14 half-size products cost 67 us more than 7 whole ones
    return batch * (roofline + extra / chip.hbm_bandwidth) + launch

"""How long a kernel takes, tile by tile: what `walk` is to the permutes.

A panel of a product takes its FLOPs at the rate that the compiler's schedules of these kernels
reach, or its weights' bytes at the memory's bandwidth. A hop takes what it takes elsewhere.
"""

from __future__ import annotations

from collective_matmul import walk
from collective_matmul.backends.pallas_tpu.arranging import Arrangement, arranged
from collective_matmul.backends.pallas_tpu.machine import Machine
from collective_matmul.hardware import Chip, planning_rate
from collective_matmul.operation import Operation, Plan

REACHED = {"v4": 0.97, "v6e": 0.97}
"""Of the peak: 1,024 x 6,144 x 10,752 four times takes 1,004 us on v4, of 984 that the peak allows,
and 303 of 295 on v6e. Elsewhere bundles are as few as the published peak allows, or fewer, which is
not believed (`python -m bench grid`)."""


def walked(op: Operation, plan: Plan, chip: Chip) -> tuple[float, float]:
    """Seconds of compute, and of waiting."""
    if not plan.lanes:
        return walk.products_time(op, op.shard_size * op.t, chip), 0.0
    made = arranged(op, plan.lanes, Machine.of(chip))
    assert isinstance(made, Arrangement), made
    ring = made.ring
    turns = ring.blocks * (made.tiles.count if made.tiles else 1)
    round_, first = _round(made, chip)
    hops = [walk.hop_time(op, plan.lanes, h, chip) for h in range(1, ring.rounds + 1)]
    if op.kind == "gather":
        end = _gathered(round_, first, turns, hops)
    else:
        end = _scattered(round_, turns, hops, chip.permute_latency)
    compute = first + ring.rounds * round_
    outside = [x for x, form in zip(op.terms, made.forms, strict=True) if form is None]
    apart = sum(
        walk.product_time(op, x, op.shard_size * op.t, chip, in_hbm=op.kind == "gather")
        for x in outside
        if x.rhs
    )
    return compute + apart, chip.permute_latency + max(0.0, end - compute)


def _round(made: Arrangement, chip: Chip) -> tuple[float, float]:
    """Seconds of one round's products, and of the first one's, which brings weights that stay."""
    every = first = 0.0
    blocks = made.ring.blocks
    reached = REACHED.get(chip.name, 1.0)
    for weights in made.weights:
        rate = reached * planning_rate(chip, weights.dtype)
        flops = weights.flops(made.ring.height) / rate
        read = weights.bytes_read(1) / chip.hbm_bandwidth
        stays = weights.tiles.resident
        every += blocks * (flops if stays else max(flops, read))
        first += max(blocks * flops, read) if stays else blocks * max(flops, read)
    return every, first


def _gathered(round_: float, first: float, turns: int, hops: list[float]) -> float:
    """A round's last tile waits for the next round's rows, which are sent on there."""
    clock, landed = 0.0, hops[0] if hops else 0.0
    for h, work in enumerate([first, *[round_] * len(hops)]):
        clock += work * (turns - 1) / turns
        if h < len(hops):
            clock = max(clock, landed)
            landed = clock + (hops[h + 1] if h + 1 < len(hops) else 0.0)
        clock += work / turns
    return clock


def _scattered(round_: float, turns: int, hops: list[float], latency: float) -> float:
    """A tile waits for the sum of the same tile, which the round before has sent."""
    clock, link, arrived = 0.0, 0.0, [0.0] * turns
    for hop in [*reversed(hops), None]:
        for tile in range(turns):
            clock = max(clock, arrived[tile]) + round_ / turns
            if hop is not None:
                link = max(link, clock) + (hop - latency) / turns
                arrived[tile] = link + latency
    return clock

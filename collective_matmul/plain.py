"""How long a plain collective takes: what `walk` is to the permutes.

It is all waiting, but pays the permute's latency once.
"""

from __future__ import annotations

from collective_matmul import hardware
from collective_matmul.operation import Operation

SEVERAL_RINGS = 2 / 3
"""Of the time of one ring both ways, what a plain gather takes over 8 or more chips of a 3-D torus:
170 and 183 us for 2,048 x 6,144 over 8 and 16 devices of v4, where one ring takes 252 and 274."""
SCATTER = {"v4": 4 / 3, "v5p": 4 / 3, "v5e": 1.1, "v6e": 1.0}
"""As many times of that of one ring takes a plain reduce-scatter over 8 devices: 336 us on v4. Over
16 of a 2-D torus it is twice as much again: 540 us on v5e."""
ASYNCHRONOUS = {"v5e": ("gather",), "7x": ("gather", "scatter")}
"""Chips on which the compiler runs a plain collective beside independent products, and which. With
both gradients of 2,048 x 6,144 x 10,752 over 4 devices it exposes none of the gather's 169 us on
v5e, and all of both collectives on v4, v5p and v6e (`python -m bench grid`)."""


def seconds(op: Operation, chip: hardware.Chip) -> float:
    """From first to last."""
    if op.t == 1:
        return 0.0
    latency = chip.permute_latency + max(0, op.t // 2 - 1) * chip.hop_latency
    shard = op.travelling.nbytes / chip.link_bandwidth
    return sum(loads(op, chip)) * _slowdown(op, chip) * shard + latency


def loads(op: Operation, chip: hardware.Chip) -> list[float]:
    """Shards on the busiest link, for each other device.

    It uses both directions of a ring, and several rings where the devices fill three dimensions.
    Two chips, and a switch, have one way. The devices of a chip share its links.
    """
    chips = op.t // chip.devices_per_chip
    if chips < 2:
        return [1 / hardware.IN_CHIP] * (op.t - 1)
    both = 1.0 if chips == 2 or chip.switched else 0.5
    fast = op.kind == "gather" or chip.name not in SCATTER
    rings = SEVERAL_RINGS if chips >= 8 and chip.links == 6 and fast else 1.0
    return [rings * both * chip.devices_per_chip * (chips - 1) / (op.t - 1)] * (op.t - 1)


def asynchronous(op: Operation, chip: hardware.Chip) -> bool:
    """Whether it runs beside independent products."""
    return op.kind in ASYNCHRONOUS.get(chip.name, ())


def _slowdown(op: Operation, chip: hardware.Chip) -> float:
    """How much longer the plain reduce-scatter takes than its bytes over one ring."""
    if op.kind == "gather" or op.t < 8:
        return 1.0
    return SCATTER.get(chip.name, 1.0) * (op.t / 8 if chip.links == 4 else 1)

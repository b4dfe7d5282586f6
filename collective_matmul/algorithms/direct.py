"""Every peer in one hop, whole shards: for a switch that joins each pair of devices (NVSwitch)."""

from __future__ import annotations

from collective_matmul.lanes import Lane


def lanes(t: int) -> tuple[Lane, ...]:
    """Every shard jumps straight to each of the `t - 1` others."""
    return tuple(Lane(shift, 1) for shift in range(1, t))

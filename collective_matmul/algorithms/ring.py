"""One direction, whole shards, `t - 1` steps: the textbook ring."""

from __future__ import annotations

from collective_matmul.lanes import Lane


def lanes(t: int) -> tuple[Lane, ...]:
    """Every shard moves one device forwards, `t - 1` times; the other link direction idles."""
    return (Lane(+1, t - 1),) if t > 1 else ()

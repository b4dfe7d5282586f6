"""Both directions, half shards, `t - 1` steps: half the bytes on each link and step."""

from __future__ import annotations

from collective_matmul.lanes import Lane, Part


def lanes(t: int) -> tuple[Lane, ...]:
    """The first half of every shard goes forwards, the second half backwards, `t - 1` times."""
    return (Lane(+1, t - 1, Part(0, 2)), Lane(-1, t - 1, Part(1, 2))) if t > 1 else ()

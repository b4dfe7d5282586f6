"""Both directions, whole shards, half the steps: full-size products on both links' time.

For even `t` the shard opposite is brought forwards alone, so the last step uses one direction.
"""

from __future__ import annotations

from collective_matmul.lanes import Lane


def lanes(t: int) -> tuple[Lane, ...]:
    """Every shard goes `t // 2` devices forwards and `(t - 1) // 2` backwards, one at a time."""
    both = (Lane(+1, t // 2), Lane(-1, (t - 1) // 2))
    return tuple(lane for lane in both if lane.hops)

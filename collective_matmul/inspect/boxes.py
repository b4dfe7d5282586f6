"""Collectives of groups on a grid: what bandwidth-optimal algorithms load onto the links.

A group of `t` devices that form a box of the grid uses every link of it all the time. With `share`
for what each device has for each other one, a link carries

    (t - 1) * share / ports    ports: both ways of a dimension that the box goes all the way around,
                               one way of any other

so that of an all-gather, whose share is the shard, `T = V / W` over all links of a device holds. A
group that stands with gaps crosses the links between, which its sibling groups cross as well: what
they send is counted. A group that is no box sends around a ring in its own order, both ways. The
devices of a chip gather once for both.

Reference: https://jax-ml.github.io/scaling-book/sharding/
"""

from __future__ import annotations

import numpy as np

from collective_matmul.inspect.routes import Grid, exchange, lines


def spread(
    grid: Grid, groups: np.ndarray, share: float, devices_share: bool
) -> tuple[np.ndarray, int]:
    """What every link carries while all groups exchange at the same time.

    Args:
      grid: the links.
      groups: int `[groups, members, dimensions]`, distinct positions.
      share: bytes that every device has for every other one of its group.
      devices_share: the last dimension is that of the devices of a chip, which share its links.

    Returns:
      Bytes `[dimension, way, position..]`, and the links on the way to the farthest member.
    """
    t, dims = groups.shape[1:]
    passes = grid.empty()
    together = 1  # devices of a chip that are in a group
    if devices_share and np.ptp(groups[..., -1], axis=1).any():
        together = grid.shape[-1]
        first = groups[groups[..., -1] == 0]
        if len(first) * together != groups.shape[0] * t:
            return _ring(grid, groups, share)
        at = first.copy()
        passes[(-1, slice(None), *at.T[:-1])] += share * t / together
        t //= together
        groups = first.reshape(-1, t, dims)
    along = [lines(grid, groups, dim) for dim in range(dims)]
    if any(each is None for each in along):
        return _ring(grid, groups, share * together)
    extended = [(d, x) for d, x in enumerate(along) if x is not None and x.members.shape[2] > 1]
    ports = sum(2 if each.closed else 1 for _, each in extended)
    counts = grid.empty()
    hops = sum(exchange(grid, counts, each, dim) for dim, each in extended)
    return passes + counts * (share * (t - 1) * together / max(1, ports)), max(1, hops)


def _ring(grid: Grid, groups: np.ndarray, share: float) -> tuple[np.ndarray, int]:
    """As `spread`, around a ring in the order of each group, half of the bytes each way."""
    t, dims = groups.shape[1:]
    starts = groups.reshape(-1, dims)
    ends = np.roll(groups, -1, axis=1).reshape(-1, dims)
    passes = grid.empty()
    step = grid.route(passes, starts, ends)
    grid.route(passes, ends, starts)
    return passes * (share * (t - 1) / 2), step * (t // 2)

"""Ways through a grid of links: how often a pattern of messages passes over each directed link.

A grid is a torus or a part of one. Link `(d, way, position)` leads from `position` one step along
dimension `d`, upwards (`way` 0) or downwards (`way` 1). Messages take one dimension after the other
and the shorter way round; where both are as long, half of the bytes go each way, as if a router
balanced them.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Grid:
    """The extent of a grid in each dimension, and whether its ends are linked."""

    shape: tuple[int, ...]
    wrap: tuple[bool, ...]

    def empty(self) -> np.ndarray:
        """No passes yet: `[dimension, way, position..]`."""
        return np.zeros((len(self.shape), 2, *self.shape))

    def walk(self, passes: np.ndarray, starts: np.ndarray, dim: int, steps: np.ndarray) -> None:
        """Adds one pass over every link on `steps[i]` steps (signed) from `starts[i]` along `dim`.

        Args:
          passes: float64 `[dimension, way, position..]`, changed in place.
          starts: int `[n, dimensions]`.
          dim: the dimension.
          steps: int `[n]`.
        """
        self._walk(passes, starts, dim, steps, np.ones(len(starts)))

    def _walk(
        self,
        passes: np.ndarray,
        starts: np.ndarray,
        dim: int,
        steps: np.ndarray,
        weights: np.ndarray,
    ) -> None:
        for way, sign in ((0, 1), (1, -1)):
            for step in range(int((sign * steps).max(initial=0))):
                moving = sign * steps > step
                at = starts[moving].copy()
                at[:, dim] = (at[:, dim] + sign * step) % self.shape[dim]
                np.add.at(passes[dim, way], tuple(at.T), weights[moving])

    def route(self, passes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> int:
        """Adds the passes of one message from each start to each end; returns the longest way.

        Args:
          passes: float64 `[dimension, way, position..]`, changed in place.
          starts: int `[n, dimensions]`.
          ends: int `[n, dimensions]`.
        """
        at = starts.copy()
        links = np.zeros(len(starts), int)
        for dim, (size, around) in enumerate(zip(self.shape, self.wrap, strict=True)):
            there = ends[:, dim] - starts[:, dim]
            weights = np.ones(len(starts))
            if around:
                there = (there + size // 2) % size - size // 2  # in [-size/2, size/2)
                ties = 2 * there == -size
                weights[ties] = 0.5
                self._walk(passes, at[ties], dim, -there[ties], weights[ties])
            self._walk(passes, at, dim, there, weights)
            links += abs(there)
            at[:, dim] = ends[:, dim]
        return int(links.max(initial=0))


@dataclasses.dataclass(frozen=True)
class Lines:
    """The members of a lattice of positions, as lines along one dimension."""

    members: np.ndarray  # int [groups, lines, members of a line, dimensions], ascending
    closed: bool  # the steps between members reach around the grid


def lines(grid: Grid, groups: np.ndarray, dim: int) -> Lines | None:
    """The lines of every group along `dim`; None where the groups are no lattices, all alike.

    Args:
      grid: where they stand.
      groups: int `[groups, members, dimensions]`, distinct positions.
      dim: the dimension.
    """
    count, size, dims = groups.shape
    distinct = (np.diff(np.sort(groups, axis=1), axis=1) != 0).sum(axis=1) + 1
    extent = distinct[0]
    if (distinct != extent).any() or np.prod(extent) != size:
        return None
    order = [*(d for d in range(dims) if d != dim), dim]
    shape = tuple(grid.shape[d] for d in order)
    key = np.ravel_multi_index(tuple(np.moveaxis(groups[..., order], -1, 0)), shape)
    sorted_groups = np.take_along_axis(groups, np.argsort(key, axis=1)[..., None], axis=1)
    members = sorted_groups.reshape(count, -1, extent[dim], dims)
    steps = np.diff(members[..., dim], axis=-1)
    even = bool(steps.size) and bool((steps == steps.flat[0]).all())
    reach = extent[dim] * int(steps.flat[0]) if even else 0
    return Lines(members, grid.wrap[dim] and reach == grid.shape[dim])


def exchange(grid: Grid, passes: np.ndarray, along: Lines, dim: int) -> int:
    """Adds one pass for every member to its neighbours in the line, both ways; returns the links
    from a member to the one that is farthest from it.

    Args:
      grid: where they stand.
      passes: float64 `[dimension, way, position..]`, changed in place.
      along: the lines.
      dim: their dimension.
    """
    members = along.members
    at = members[..., dim]
    following = np.roll(at, -1, axis=-1) if along.closed else at[..., 1:]
    starts = members if along.closed else members[..., :-1, :]
    ends = np.roll(members, -1, axis=-2) if along.closed else members[..., 1:, :]
    steps = (following - starts[..., dim]) % grid.shape[dim]
    flat = starts.reshape(-1, starts.shape[-1])
    grid.walk(passes, flat, dim, steps.reshape(-1))
    grid.walk(passes, ends.reshape(flat.shape), dim, -steps.reshape(-1))
    return grid.shape[dim] // 2 if along.closed else int(np.ptp(at, axis=-1).max())

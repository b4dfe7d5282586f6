"""A schedule as a kernel sees it: which rows a lane holds after a hop, and who is next on its way.

A kernel runs `hops + 1` rounds. In round `h` a lane's rows are those of the device `shift * h`
places behind; round 0 is the device's own shard. A round is worked on in `blocks` panels, so that
the rows of all lanes in a panel fit on chip, one lane's below the other's.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from collective_matmul.lanes import Lane, steps
from collective_matmul.operation import AxisName

Scalar = Any  # an int32, traced
Device = dict[str | tuple[str, ...], Any]  # coordinates by the names of axes


@dataclasses.dataclass(frozen=True)
class Ring:
    """What is known of the schedule when a kernel is traced.

    Args:
      lanes: none of whose parts is empty.
      t: devices.
      shard: rows of one device's shard.
      unit: of these, rows that no lane may cut apart.
      axis_name: along which the lanes move.
      mesh: names of all axes of the mesh, by which a kernel says who its peers are.
      blocks: panels of a round.
    """

    lanes: tuple[Lane, ...]
    t: int
    shard: int
    unit: int
    axis_name: AxisName
    mesh: tuple[str, ...]
    blocks: int = 1

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the axes that act as the ring."""
        return (self.axis_name,) if isinstance(self.axis_name, str) else self.axis_name

    @functools.cached_property
    def rounds(self) -> int:
        """Of hops; there is one more of products."""
        return steps(self.lanes)

    @functools.cached_property
    def panels(self) -> int:
        """Of all rounds."""
        return (self.rounds + 1) * self.blocks

    @functools.cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Of each lane, its first and one-past-last row in a shard."""
        cut = (lane.part.bounds(self.shard // self.unit) for lane in self.lanes)
        return tuple((start * self.unit, stop * self.unit) for start, stop in cut)

    @functools.cached_property
    def heights(self) -> tuple[int, ...]:
        """Of each lane, its rows in a panel."""
        return tuple((stop - start) // self.blocks for start, stop in self.bounds)

    @functools.cached_property
    def tops(self) -> tuple[int, ...]:
        """Of each lane, its first row in a panel."""
        return tuple(itertools.accumulate(self.heights, initial=0))[:-1]

    @functools.cached_property
    def height(self) -> int:
        """Rows of a panel."""
        return sum(self.heights)

    @functools.cached_property
    def owners(self) -> tuple[bool, ...]:
        """Of each lane, whether it works on its part of the device's own shard: one does."""
        parts = [lane.part for lane in self.lanes]
        return tuple(part not in parts[:i] for i, part in enumerate(parts))

    def place(self, panel: Scalar) -> tuple[Scalar, Scalar]:
        """The round that a panel belongs to, and its number there."""
        # Blocks are a power of two; a core that divides takes a hundred cycles.
        shift = np.int32(self.blocks.bit_length() - 1)
        return panel >> shift, panel & np.int32(self.blocks - 1)

    def place_backwards(self, panel: Scalar) -> tuple[Scalar, Scalar]:
        """`place`, where the rounds are counted down to 0."""
        passed, block = self.place(panel)
        return np.int32(self.rounds) - passed, block

    def landing(self, lane: int, h: Scalar, block: Scalar) -> Any:
        """Rows where a scatter's sums land that a lane needs in round h."""
        start, stop = self.bounds[lane]
        row = h * np.int32(stop - start) + block * np.int32(self.heights[lane])
        return self.rows(row, self.heights[lane])

    def within(self, lane: int) -> slice:
        """The rows of a lane in a panel."""
        return slice(self.tops[lane], self.tops[lane] + self.heights[lane])

    def active(self, lane: int, h: Scalar) -> Scalar:
        """Whether a lane has rows to multiply in round h."""
        return jnp.where(h == 0, self.owners[lane], h <= self.lanes[lane].hops)

    def first_row(self, me: Scalar, lane: int, h: Scalar, block: Scalar = 0) -> Scalar:
        """Of a lane's rows in round h, or of one block of them, among the rows of all devices."""
        shift = np.int32(-self.lanes[lane].shift % self.t)
        device = lax.rem(me + shift * h, np.int32(self.t))
        start = np.int32(self.bounds[lane][0])
        return device * np.int32(self.shard) + start + block * np.int32(self.heights[lane])

    def rows(self, first: Scalar, height: int) -> Any:
        """An index of rows of an array in HBM, the first of them one of `first_row`."""
        return pl.ds(pl.multiple_of(first, self.alignment), height)

    def each(self, h: Scalar, do: Callable[[int], None], also: Any = True) -> None:
        """Does something for each lane that is active in round h, if a condition holds too."""
        for i in range(len(self.lanes)):
            pl.when(also & self.active(i, h))(functools.partial(do, i))

    def each_hop(self, lane: int, do: Callable[[Scalar], None]) -> None:
        """Does something for each hop of a lane, from 1 on."""
        last = np.int32(self.lanes[lane].hops + 1)
        lax.fori_loop(np.int32(1), last, lambda h, _: do(h), None)

    @functools.cached_property
    def alignment(self) -> int:
        """What every first row is a multiple of."""
        return functools.reduce(np.gcd, (self.shard, *sum(self.bounds, ()), *self.heights)).item()

    def told(
        self,
        kind: str,
        bytes_a_row: int,
        tiles: int,
        together: int = 1,
        carried: list[list[int]] | None = None,
    ) -> dict[str, str]:
        """The metadata that `inspect` reads a kernel's schedule from.

        Args:
          kind: "gather" or "scatter".
          bytes_a_row: that travel.
          tiles: that a panel's product is made in.
          together: of a round's tiles, as many are waited for at once.
          carried: `moved` of what a scatter carries besides.
        """
        schedule = {
            "kind": kind,
            "axes": self.names,
            "lanes": self.moved(bytes_a_row),
            "blocks": self.blocks,
            "tiles": tiles,
        }
        schedule |= {"together": together} if together > 1 else {}
        schedule |= {"carried": carried} if carried else {}
        return {"collective": json.dumps(schedule)}

    def sent(self, bytes_a_row: int) -> int:
        """Bytes that leave a device, and as many arrive."""
        return (self.t - 1) * self.shard * bytes_a_row

    def moved(self, bytes_a_row: int) -> list[list[int]]:
        """Of each lane, its shift, its hops and a hop's bytes."""
        sizes = (stop - start for start, stop in self.bounds)
        return [
            [lane.shift, lane.hops, rows * bytes_a_row]
            for lane, rows in zip(self.lanes, sizes, strict=True)
        ]


class Peers:
    """Who this device is on the ring, and the coordinates of those that it talks to.

    Args:
      ids: what `peers` made.
      ring: for which.
    """

    def __init__(self, ids: Any, ring: Ring) -> None:
        self._ids, self._axes = ids, ring.mesh

    @property
    def me(self) -> Scalar:
        """This device's place on the ring."""
        return self._ids[0]

    def ahead(self, lane: int) -> Device:
        """Who stands the lane's shift ahead: a gather sends there."""
        return self._peer(2 * lane)

    def behind(self, lane: int) -> Device:
        """Who stands the lane's shift behind: a scatter sends there."""
        return self._peer(2 * lane + 1)

    def _peer(self, number: int) -> Device:
        first = 1 + number * len(self._axes)
        return {name: self._ids[first + i] for i, name in enumerate(self._axes)}


def peers(ring: Ring) -> jax.Array:
    """This device's place, and the peers' coordinates along every axis of the mesh: int32 scalars.

    They come from outside the kernel: an axis index has a type of what it varies over, which is
    nothing that a kernel knows of.
    """
    sizes = [lax.axis_size(name) for name in ring.names]
    me = lax.axis_index(ring.axis_name)
    found = [me]
    for lane in ring.lanes:
        for shift in (lane.shift, -lane.shift):
            place = lax.rem(me + np.int32(shift % ring.t), np.int32(ring.t))
            along = dict(zip(ring.names, _unravelled(place, sizes), strict=True))
            found += [along[x] if x in along else lax.axis_index(x) for x in ring.mesh]
    return jnp.stack(found)


def collective_id(ring: Ring) -> int:
    """The number of the barrier that kernels along these axes share.

    Nobody leaves a kernel before everybody along its axes has passed its barrier, so one is enough
    for all kernels along the same axes; kernels along others must have another.
    """
    return sum(1 << ring.mesh.index(name) for name in ring.names)


def barrier(ready: Sequence[Device]) -> None:
    """Tells those that will send here that they may, and waits for as many words of that kind."""
    waiting = pltpu.get_barrier_semaphore()
    for device in ready:
        pl.semaphore_signal(waiting, 1, device_id=device)
    pl.semaphore_wait(waiting, len(ready))


def _unravelled(place: Scalar, sizes: list[int]) -> list[Scalar]:
    strides = [functools.reduce(operator.mul, sizes[i + 1 :], 1) for i in range(len(sizes))]
    return [
        lax.rem(lax.div(place, np.int32(stride)), np.int32(size))
        for stride, size in zip(strides, sizes, strict=True)
    ]

"""Rows of every device on their way around, from HBM to HBM, within a kernel that does other work.

Arrivals have each a place of their own, where the assembled operand has them, and are sent on from
there. One core does this for the device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from collective_matmul.backends.pallas_tpu.calling import like
from collective_matmul.backends.pallas_tpu.ring import Peers, Ring, Scalar

ROOM = 100  # of a core's semaphores, those left for hops that are carried by a scatter's kernel


class Passenger(NamedTuple):
    """What another kernel is to carry.

    Args:
      ring: which has that kernel's lanes.
      rows: this device's, [shard, k].
    """

    ring: Ring
    rows: jax.Array

    @property
    def gathered(self) -> jax.ShapeDtypeStruct:
        """Those of all devices, [t * shard, k]."""
        shape = (self.ring.t * self.ring.shard, self.rows.shape[1])
        return like(self.rows, shape, self.rows.dtype)

    @property
    def sent(self) -> int:
        """Bytes that leave a device, and as many arrive."""
        return self.ring.sent(self._bytes_a_row)

    @property
    def moved(self) -> list[list[int]]:
        """Of each lane, its shift, its hops and a hop's bytes."""
        return self.ring.moved(self._bytes_a_row)

    @property
    def _bytes_a_row(self) -> int:
        return int(self.rows.shape[1] * self.rows.dtype.itemsize)


class Passing:
    """Of one device.

    Args:
      ring, peers: along which the rows move.
      arrays: this device's rows, and those of all devices, which they are put into.
      semaphores: those of `scratch`.
    """

    def __init__(
        self, ring: Ring, peers: Peers, arrays: tuple[Any, Any], semaphores: tuple[Any, ...]
    ) -> None:
        self._ring, self._peers = ring, peers
        self._x, self._gathered = arrays
        self._sent, self._received, self._placed = semaphores

    @staticmethod
    def scratch(ring: Ring) -> list[Any]:
        """What it needs of a kernel."""
        hops = (len(ring.lanes), ring.rounds)
        return [*[pltpu.SemaphoreType.DMA(hops)] * 2, pltpu.SemaphoreType.DMA(())]

    def begin(self, whole: bool) -> None:
        """Sends this device's rows, those ahead being in the kernel; if all are wanted together,
        as a `whole`, puts them among them too."""
        for i in range(len(self._ring.lanes)):
            self._hop(i, np.int32(1), first=True).start()
        if whole:
            self._own_rows().start()

    def on(self, i: int, h: Scalar) -> None:
        """Waits for the rows of a lane's hop h, and sends them on."""
        self._hop(i, h, arriving=True).wait_recv()
        on = h < self._ring.lanes[i].hops
        pl.when(on)(lambda: self._hop(i, h + np.int32(1)).start())

    def finish(self, whole: bool) -> None:
        """Waits until what was sent has left."""
        for i in range(len(self._ring.lanes)):
            self._ring.each_hop(i, functools.partial(self._depart, i))
        if whole:
            self._own_rows().wait()

    def _depart(self, i: int, h: Scalar) -> None:
        self._hop(i, h).wait_send()

    def _hop(self, i: int, h: Scalar, first: bool = False, arriving: bool = False) -> Any:
        """Hop h of lane i: from here, or `arriving` from behind."""
        start, stop = self._ring.bounds[i]
        behind = h if arriving else h - np.int32(1)
        row = self._ring.first_row(self._peers.me, i, behind)
        place = self._gathered.at[self._ring.rows(row, stop - start)]
        rows = self._x.at[pl.ds(start, stop - start)] if first else place
        at = (i, lax.min(h - np.int32(1), np.int32(self._ring.rounds - 1)))
        return pltpu.make_async_remote_copy(
            rows, place, self._sent.at[at], self._received.at[at], device_id=self._peers.ahead(i)
        )

    def _own_rows(self) -> Any:
        row = self._peers.me * np.int32(self._ring.shard)
        place = self._gathered.at[self._ring.rows(row, self._ring.shard)]
        return pltpu.make_async_copy(self._x, place, self._placed)

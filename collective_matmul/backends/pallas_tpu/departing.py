"""A scatter's sums on their way: when a tile may leave, and when one that is needed has arrived.

One core sends its tiles from on-chip memory as they are made. Of several cores the first one sends
for all, from HBM to HBM: each leaves its tile in a staging place there, and a turn later, when all
have said so, they go together. The first core then tells the others that the place is free again
and that what they need next has arrived: one word each way a turn.

Reference: https://docs.jax.dev/en/latest/pallas/tpu/distributed.html, which recommends copies by
one core, from HBM to HBM, where a device has two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from collective_matmul.backends.pallas_tpu.ring import Peers, Ring, Scalar, barrier
from collective_matmul.backends.pallas_tpu.tiles import Tiles, together
from collective_matmul.backends.pallas_tpu.weights import Turn


class Departures:
    """Of one core, within a kernel.

    Args:
      ring, peers: along which sums travel.
      place: the core, of how many, and the tiles that they take in turns.
      landings: of each lane, where sums land, on this device and on others.
      leaving: two tiles on chip.
      staging: two tiles of each core in HBM, or None for one core.
      semaphores: of what is sent, received and staged; of tiles that others staged, and of turns
        that the first core allows.
    """

    def __init__(
        self,
        ring: Ring,
        peers: Peers,
        place: tuple[Scalar, int, Tiles],
        landings: Sequence[Any],
        leaving: Any,
        staging: Any,
        semaphores: tuple[Any, ...],
    ) -> None:
        self._ring, self._peers, self._landings = ring, peers, landings
        self._core, self._cores, self._tiles = place
        self._leaving, self._staging = leaving, staging
        self._sent, self._received, self._staged, self._made, self._free = semaphores
        self._together = together(ring, self._tiles.count)

    def agree(self, both_ways: bool = False) -> None:
        """Waits until those that will be sent to, behind or `both_ways`, are in this kernel."""
        lanes = range(len(self._ring.lanes))
        ready = [self._peers.ahead(i) for i in lanes]
        ready += [self._peers.behind(i) for i in lanes] if both_ways else []
        pl.when(self._core == 0)(lambda: barrier(ready))

    def place(self, turn: Turn, rows: slice, total: jax.Array) -> None:
        """Puts these rows of a turn's tile where they leave from."""
        self._leaving[turn.slot, rows] = total.astype(self._leaving.dtype)

    def leave(self, turn: Turn) -> None:
        """Sends the tile, or stages it."""
        go = self._remote if self._staging is None else self._stage
        self._each(turn, lambda i: go(i, turn).start())

    def exchange(self, turn: Turn, upcoming: Turn) -> None:
        """Waits until this turn's places are free, and what the upcoming one needs has arrived."""
        if self._staging is None:
            self._settle(turn.last_but_one())
            self._receive(upcoming)
            return
        before = turn.previous()
        self._each(before, lambda i: self._stage(i, before).wait())

        @pl.when(self._core != 0)
        def _() -> None:
            pl.semaphore_signal(self._made, 1, core_index=0)
            pl.semaphore_wait(self._free, 1)

        @pl.when(self._core == 0)
        def _() -> None:
            pl.semaphore_wait(self._made, self._cores - 1)
            self._each(before, lambda i: self._remote(i, before).start())
            self._settle(turn.last_but_one())
            self._receive(upcoming)
            for other in range(1, self._cores):
                pl.semaphore_signal(self._free, 1, core_index=other)

    def finish(self, after: Turn) -> None:
        """Waits until the last tiles have left; `after` is the turn behind them."""

        @pl.when(self._core == 0)
        def _() -> None:
            self._settle(after.last_but_one())
            self._settle(after.previous())

    def _settle(self, turn: Turn) -> None:
        self._each(turn, lambda i: self._remote(i, turn).wait_send())

    def _receive(self, turn: Turn) -> None:
        h, block = self._ring.place_backwards(turn.panel)
        within = turn.panel < self._ring.panels
        above = h + np.int32(1)  # what was active a round before has sent
        if self._together == 1:
            arrived = self._wait
        else:
            piece, pieces = self._piece(block, turn), self._ring.blocks * self._tiles.count
            within &= piece & np.int32(self._together - 1) == 0

            def arrived(i: int, turn: Turn) -> None:
                def member(k: Scalar, _: None) -> None:
                    pl.when(piece + k < pieces)(lambda: self._wait(i, turn))

                # So many trips always, for a schedule tells nothing of others.
                lax.fori_loop(np.int32(0), np.int32(self._together), member, None)

        self._ring.each(above, lambda i: arrived(i, turn), within)

    def _wait(self, i: int, turn: Turn) -> None:
        self._remote(i, turn, arriving=True).wait_recv()

    def _piece(self, block: Scalar, turn: Turn) -> Scalar:
        """Which tile of its round a turn is about."""
        return block * np.int32(self._tiles.count) + turn.tile

    def _group(self, piece: Scalar) -> Scalar:
        """Whose semaphore it has."""
        return piece if self._together == 1 else piece >> np.int32(self._together.bit_length() - 1)

    def _each(self, turn: Turn, do: Callable[[int], None]) -> None:
        """Does something for each lane whose sum leaves in a turn, if there is one."""
        h, _ = self._ring.place_backwards(turn.panel)
        self._ring.each(h, do, (turn.panel >= 0) & (h > 0))

    def _stage(self, i: int, turn: Turn) -> Any:
        rows, width = self._ring.within(i), self._tiles.width
        columns = pl.ds(pl.multiple_of(self._core * np.int32(width), width), width)
        return pltpu.make_async_copy(
            self._leaving.at[turn.slot, rows],
            self._staging.at[turn.slot, rows, columns],
            self._staged.at[i, turn.slot],
        )

    def _remote(self, i: int, turn: Turn, arriving: bool = False) -> Any:
        """A turn's tiles: from here, for the round below; or arriving, for their own round."""
        ring, tiles = self._ring, self._tiles
        h, block = ring.place_backwards(turn.panel)
        below = lax.clamp(
            np.int32(0), h if arriving else h - np.int32(1), np.int32(ring.rounds - 1)
        )
        width = self._cores * tiles.width
        columns = pl.ds(pl.multiple_of(turn.tile * np.int32(width), width), width)
        source = self._leaving if self._staging is None else self._staging
        return pltpu.make_async_remote_copy(
            source.at[turn.slot, ring.within(i)],
            self._landings[i].at[ring.landing(i, below, block), columns],
            self._sent.at[i, turn.slot],
            self._received.at[i, below, self._group(self._piece(block, turn))],
            device_id=self._peers.behind(i),
        )

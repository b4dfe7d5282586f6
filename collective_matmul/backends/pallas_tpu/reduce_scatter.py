"""`y = S(sum_i x_i . w_i)` in one kernel: sums travel tile by tile while others are made.

    for each round h from the last to 0, for each panel p of it, for each tile:
        sum = sum_i x_i[rows of p] . w_i[tile] + what has arrived for it
        if h: send it on;  else: y[rows, tile] = sum

A tile of a sum leaves when it is made, and the next device needs it a round later, when it comes to
the same tile. By permutes a sum leaves when all of it is made, and is all waited for.

Another operand may be carried to all devices in the same rounds, from HBM to HBM (`passing`).

Arrivals have each a place of their own in HBM, so a barrier at the beginning is all that neighbours
have to agree on. Where a device has several cores, each makes its own columns, and the first one
alone talks to other devices (`departing`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from collective_matmul.backends.pallas_tpu.calling import kernel_call, like
from collective_matmul.backends.pallas_tpu.departing import Departures
from collective_matmul.backends.pallas_tpu.machine import Machine
from collective_matmul.backends.pallas_tpu.passing import Passenger, Passing
from collective_matmul.backends.pallas_tpu.ring import Peers, Ring, Scalar
from collective_matmul.backends.pallas_tpu.tiles import Tiles, together
from collective_matmul.backends.pallas_tpu.weights import Columns, Stream, Turn, Weights


def reduce_scatter(
    machine: Machine,
    ring: Ring,
    tiles: Tiles,
    left: Sequence[jax.Array],
    right: Sequence[tuple[jax.Array, Weights]],
    *,
    wire: np.dtype,
    out: np.dtype,
    carried: Passenger | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """This device's shard of the sum, and what was carried.

    Args:
      machine: that the kernel is for.
      ring: with panels that fit there.
      tiles: of a panel's sum.
      left: x_i, [t * shard, k_i] each; or without right operands one [t * shard, n], the addend.
      right: of each product w and how it is read; the tiles of all are the same.
      wire, out: dtypes in which sums travel and are returned.
      carried: what goes to all devices besides, a round of hops under each round of products.

    Returns:
      y, [shard, n]; and the rows of all devices of what was carried.
    """
    lanes, n, cores = len(ring.lanes), tiles.width * tiles.total, machine.cores
    panel, shared = (ring.height, tiles.width), together(ring, tiles.count)
    groups = -(-ring.blocks * tiles.count // shared)
    scratch: list[Any] = [
        pltpu.SemaphoreType.DMA((lanes, ring.rounds, groups)),  # received
        *[pltpu.SemaphoreType.DMA((lanes, 2))] * 4,  # sent, brought, written, copied
        *[pltpu.SemaphoreType.REGULAR(())] * 2,  # between cores
        *[pltpu.VMEM((2, *panel), wire)] * 2,  # what arrived, what leaves
        pltpu.VMEM((2, *panel), out),
        *(pltpu.VMEM((2, ring.height, x.shape[1]), x.dtype) for x in left),
    ]
    for _, weights in right:
        scratch += weights.scratch
    results = [like(left[0], (ring.shard, n), out)]
    if carried:
        results.append(carried.gathered)
        scratch += Passing.scratch(carried.ring)
    results += [
        like(left[0], (lane.hops * (stop - start), n), wire)
        for lane, (start, stop) in zip(ring.lanes, ring.bounds, strict=True)
    ]
    if cores > 1:  # where tiles of all cores wait to be sent together
        results.append(like(left[0], (2, ring.height, cores * tiles.width), wire))
    sent = ring.sent(n * wire.itemsize)
    passed = carried.sent if carried else 0
    cost = pl.CostEstimate(
        flops=sum(weights.flops(ring.panels * ring.height) for _, weights in right),
        transcendentals=0,
        bytes_accessed=2 * passed
        + sum(weights.bytes_read(ring.panels) for _, weights in right)
        + sum(cores * x.size * x.dtype.itemsize for x in left)
        + (2 if cores == 1 else 4) * sent
        + ring.shard * n * out.itemsize,
        remote_bytes_transferred=sent + passed,
    )
    path = carried.ring if carried else None
    y, *others = kernel_call(
        lambda *refs: _Kernel(
            ring, tiles, [w for _, w in right], len(left), cores, path, refs
        ).run(),
        machine,
        ring,
        "matmul_reduce_scatter" if right else "reduce_scatter",
        (*left, *(w for w, _ in right), *([carried.rows] if carried else [])),
        results,
        scratch,
        cores=cores,
        cost=cost,
        told=ring.told(
            "scatter",
            n * wire.itemsize,
            tiles.count,
            shared,
            carried.moved if carried else None,
        ),
    )
    return y, others[0] if carried else None


class _Kernel:
    """The whole, on one core."""

    def __init__(
        self,
        ring: Ring,
        tiles: Tiles,
        weights: Sequence[Weights],
        count: int,
        cores: int,
        path: Ring | None,
        refs: Sequence[Any],
    ) -> None:
        lanes, n = len(ring.lanes), len(weights)
        ids, *refs = refs
        self.x, w, refs = refs[:count], refs[count : count + n], refs[count + n :]
        rows, refs = (refs[0], refs[1:]) if path else (None, refs)
        self.y, *refs = refs
        gathered, refs = (refs[0], refs[1:]) if path else (None, refs)
        self.landings, refs = refs[:lanes], refs[lanes:]
        staging, refs = (refs[0], refs[1:]) if cores > 1 else (None, refs)
        received, sent, self.brought, written, self.copied, made, free, *refs = refs
        self.arrived, leaving, self.made, *refs = refs
        self.written = written
        self.held, own = refs[:count], refs[count:]
        self.ring, self.tiles, self.peers = ring, tiles, Peers(ids, ring)
        core = self.core = pl.program_id(0)
        self.passing = path and Passing(path, self.peers, (rows, gathered), tuple(own[2 * n :]))
        self.columns = Columns(tiles, core, cores)
        self.departures = Departures(
            ring,
            self.peers,
            (core, cores, tiles),
            self.landings,
            leaving,
            staging,
            (sent, received, written, made, free),
        )
        self.streams = [
            Stream(each, (w[i], *own[2 * i : 2 * i + 2]), self.columns, ring.panels)
            for i, each in enumerate(weights)
        ]

    def run(self) -> None:
        """From the barrier to the last copy."""
        ring = self.ring
        passing = self.passing
        self.departures.agree(both_ways=passing is not None)
        if passing:
            pl.when(self.core == 0)(lambda: passing.begin(whole=True))
        for stream in self.streams:
            stream.begin(self._turn(np.int32(0), np.int32(0)))
        self._copy(np.int32(0), lambda copy: copy.start())
        sums, end = np.int32(ring.panels - ring.blocks), np.int32(ring.panels)
        lax.fori_loop(np.int32(0), sums, lambda p, _: self._panel(p, last=False), None)
        lax.fori_loop(sums, end, lambda p, _: self._panel(p, last=True), None)
        after = self._turn(end, np.int32(0))
        self._settle(after.last_but_one())
        self._settle(after.previous())
        self.departures.finish(after)
        if passing:
            pl.when(self.core == 0)(lambda: passing.finish(whole=True))

    def _turn(self, panel: Scalar, tile: Scalar) -> Turn:
        return Turn(panel, tile, self.tiles.count)

    def _panel(self, p: Scalar, last: bool) -> None:
        """A panel of the last round, or of one before."""
        if self.passing:
            passed, block = self.ring.place(p)
            first = (block == 0) & (passed > 0) & (self.core == 0)
            self.ring.each(passed, functools.partial(self.passing.on, h=passed), first)
        self._copy(p, lambda copy: copy.wait())
        following = p + np.int32(1)
        pl.when(following < self.ring.panels)(
            lambda: self._copy(following, lambda copy: copy.start())
        )
        count = np.int32(self.tiles.count)
        lax.fori_loop(np.int32(0), count, lambda j, _: self._tile(self._turn(p, j), last), None)

    def _tile(self, turn: Turn, last: bool) -> None:
        """A tile, while what arrives for the next one is brought. Not if that is the next round's:
        its sender may wait for this one."""
        upcoming = turn.next() if self.tiles.count * self.ring.blocks > 1 else turn
        for stream in self.streams:
            stream.begin(turn.next())
        self._settle(turn.last_but_one())
        self.departures.exchange(turn, upcoming)
        self._bring(upcoming, lambda copy: copy.start())
        self._bring(turn, lambda copy: copy.wait())
        for stream in self.streams:
            stream.arrive(turn)
        (self._write if last else self._send)(turn, self._products(turn))

    def _products(self, turn: Turn) -> jax.Array:
        slot = turn.panel & np.int32(1)
        if not self.streams:
            return self.held[0][slot, :, self.columns.at(turn)]
        total = self.streams[0].product(self.held[0][slot], turn)
        for stream, held in zip(self.streams[1:], self.held[1:], strict=True):
            total = total + stream.product(held[slot], turn)
        return total

    def _send(self, turn: Turn, total: jax.Array) -> None:
        """Sums of the panel, with what arrived for them, on to the next device."""
        h, _ = self.ring.place_backwards(turn.panel)
        for i, lane in enumerate(self.ring.lanes):
            rows = self.ring.within(i)
            arrived = self.arrived[turn.slot, rows].astype(total.dtype)
            arrived = jnp.where(h < lane.hops, arrived, jnp.zeros_like(arrived))
            self.departures.place(turn, rows, total[rows] + arrived)
        self.departures.leave(turn)

    def _write(self, turn: Turn, total: jax.Array) -> None:
        """Sums that are whole."""
        ring = self.ring
        for i, lane in enumerate(ring.lanes):
            if ring.owners[i]:
                own = total[ring.within(i)]
                for other, each in enumerate(ring.lanes):
                    if each.part == lane.part:
                        own = own + self.arrived[turn.slot, ring.within(other)].astype(own.dtype)
                self.made[turn.slot, ring.within(i)] = own.astype(self.made.dtype)
                self._home(i, turn).start()

    def _settle(self, turn: Turn) -> None:
        """Waits until a turn's tile of the result, if there is one, is where it belongs."""
        h, _ = self.ring.place_backwards(turn.panel)
        self.ring.each(h, lambda i: self._home(i, turn).wait(), (turn.panel >= 0) & (h == 0))

    def _bring(self, turn: Turn, do: Any) -> None:
        """Does something about the copies to the chip of what has arrived for a turn's tile."""
        h, block = self.ring.place_backwards(turn.panel)

        def bring(i: int) -> None:
            rows = self.ring.landing(i, h, block)
            landed = self.landings[i].at[rows, self.columns.at(turn)]
            held = self.arrived.at[turn.slot, self.ring.within(i)]
            do(pltpu.make_async_copy(landed, held, self.brought.at[i, turn.slot]))

        self.ring.each(h + np.int32(1), bring, turn.panel < self.ring.panels)

    def _home(self, i: int, turn: Turn) -> Any:
        """A lane's tile of the result on its way to HBM."""
        ring = self.ring
        _, block = ring.place_backwards(turn.panel)
        row = np.int32(ring.bounds[i][0]) + block * np.int32(ring.heights[i])
        y = self.y.at[ring.rows(row, ring.heights[i]), self.columns.at(turn)]
        made = self.made.at[turn.slot, ring.within(i)]
        return pltpu.make_async_copy(made, y, self.written.at[i, turn.slot])

    def _copy(self, p: Scalar, do: Any) -> None:
        """Does something about the copies of panel p's operands on to the chip."""
        ring, slot = self.ring, p & np.int32(1)
        h, block = ring.place_backwards(p)

        def copy(i: int) -> None:
            row = ring.first_row(self.peers.me, i, h, block)
            for x, held in zip(self.x, self.held, strict=True):
                rows = x.at[ring.rows(row, ring.heights[i])]
                place = held.at[slot, ring.within(i)]
                do(pltpu.make_async_copy(rows, place, self.copied.at[i, slot]))

        ring.each(h, copy)

"""`y_i = G(x) . w_i` in one kernel: rows arrive by remote copies while others are multiplied.

    fetch(0)
    for each panel p, for each tile:
        if it is the last one: fetch(p + 1)
        y[rows of p, tile] = x[rows of p] . w[tile]

`fetch` waits for rows that are to arrive, sends them on at once, and begins to copy them to where
they are multiplied. So a hop has a round of products to travel under, and however short a chunk is,
the weights are read once a round, or once altogether, where by permutes each chunk is a product of
its own that reads them again.

Arrivals have each a place of their own, where the assembled operand has them; so a barrier at the
beginning is all that neighbours have to agree on. Where a device has several cores, the first one
talks to other devices, and tells the others of what arrived; each makes its own columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from collective_matmul.backends.pallas_tpu.calling import kernel_call, like
from collective_matmul.backends.pallas_tpu.machine import Machine
from collective_matmul.backends.pallas_tpu.passing import Passing
from collective_matmul.backends.pallas_tpu.ring import Peers, Ring, Scalar, barrier
from collective_matmul.backends.pallas_tpu.weights import Columns, Stream, Turn, Weights


def all_gather(
    machine: Machine,
    ring: Ring,
    x: jax.Array,
    right: Sequence[tuple[jax.Array, Weights, np.dtype]],
    *,
    whole: bool,
) -> tuple[list[jax.Array], jax.Array]:
    """The products, and the gathered operand.

    Args:
      machine: that the kernel is for.
      ring: with panels that fit there.
      x: [shard, k], this device's rows.
      right: of each product w, how it is read, and the dtype of y. There need be none.
      whole: put this device's own rows into the gathered operand too; no product needs them there.

    Returns:
      y_i, [t * shard, n_i] each; and [t * shard, k].
    """
    rows, k = ring.t * ring.shard, x.shape[1]
    cores = machine.cores if right else 1
    lanes, hops = len(ring.lanes), ring.rounds
    results = [like(x, (rows, weights.n), out) for _, weights, out in right]
    *moving, placed = Passing.scratch(ring)
    scratch: list[Any] = [
        *moving,
        pltpu.SemaphoreType.REGULAR((lanes, hops)),  # told to other cores
        placed,
        pltpu.SemaphoreType.DMA((lanes, 2)),  # copied to be multiplied
    ]
    if right:
        scratch.append(pltpu.VMEM((2, ring.height, k), x.dtype))
    for _, weights, out in right:
        made = pltpu.VMEM((2, ring.height, weights.tiles.width), out)
        scratch += [*weights.scratch, made, pltpu.SemaphoreType.DMA((lanes, 2))]
    size = x.dtype.itemsize
    cost = pl.CostEstimate(
        flops=sum(weights.flops(ring.panels * ring.height) for _, weights, _ in right),
        transcendentals=0,
        bytes_accessed=sum(weights.bytes_read(ring.panels) for _, weights, _ in right)
        + sum(y.size * y.dtype.itemsize for y in results)
        + (cores + 1) * rows * k * size,
        remote_bytes_transferred=ring.sent(k * size),
    )
    turns = max((weights.tiles.count for _, weights, _ in right), default=1)
    *ys, gathered = kernel_call(
        lambda *refs: _Kernel(ring, [weights for _, weights, _ in right], cores, refs).run(whole),
        machine,
        ring,
        "all_gather_matmul" if right else "all_gather",
        (x, *(w for w, _, _ in right)),
        [*results, like(x, (rows, k), x.dtype)],
        scratch,
        cores=cores,
        cost=cost,
        told=ring.told("gather", k * size, turns),
    )
    return ys, gathered


class _Term:
    """One product within the kernel: weights that come, tiles of the result that leave."""

    def __init__(self, kernel: _Kernel, weights: Weights, refs: Sequence[Any]) -> None:
        w, self.y, held, arrived, self.made, self.left = refs
        self.ring, self.count = kernel.ring, weights.tiles.count
        self.columns = Columns(weights.tiles, kernel.core, kernel.cores)
        self.stream = Stream(weights, (w, held, arrived), self.columns, self.ring.panels)

    def turn(self, panel: Scalar, tile: Scalar) -> Turn:
        """A core's turn."""
        return Turn(panel, tile, self.count)

    def make(self, turn: Turn, x: Any, rows: Sequence[Scalar]) -> None:
        """A tile of rows that begin here, of each lane, in the result."""
        self.stream.arrive(turn)
        self.made[turn.slot] = self.stream.product(x[...], turn).astype(self.made.dtype)
        h, _ = self.ring.place(turn.panel)
        self.ring.each(h, lambda i: self._leave(i, turn, rows[i]).start())

    def settle(self, turn: Turn) -> None:
        """Waits until a turn's tile, if there is one, is where it belongs."""

        @pl.when(self.columns.exists(turn))
        def _() -> None:
            h, _ = self.ring.place(turn.panel)
            # Whatever the rows, as many bytes are waited for.
            self.ring.each(h, lambda i: self._leave(i, turn, np.int32(0)).wait())

    def _leave(self, i: int, turn: Turn, row: Scalar) -> Any:
        rows = self.ring.rows(row, self.ring.heights[i])
        return pltpu.make_async_copy(
            self.made.at[turn.slot, self.ring.within(i)],
            self.y.at[rows, self.columns.at(turn)],
            self.left.at[i, turn.slot],
        )


class _Kernel:
    """The whole, on one core."""

    def __init__(
        self, ring: Ring, weights: Sequence[Weights], cores: int, refs: Sequence[Any]
    ) -> None:
        n = len(weights)
        ids, self.x, *refs = refs
        w, y, self.gathered = refs[:n], refs[n : 2 * n], refs[2 * n]
        sent, received, self.told, placed, self.copied, *refs = refs[2 * n + 1 :]
        self.held: Any = refs.pop(0) if n else None
        self.ring, self.peers = ring, Peers(ids, ring)
        arrays = (self.x, self.gathered)
        self.passing = Passing(ring, self.peers, arrays, (sent, received, placed))
        self.core, self.cores = pl.program_id(0), cores
        own = (refs[4 * i : 4 * i + 4] for i in range(n))
        self.terms = [
            _Term(self, each, (w[i], y[i], *rest))
            for i, (each, rest) in enumerate(zip(weights, own, strict=True))
        ]

    def run(self, whole: bool) -> None:
        """From the barrier to the last copy."""
        ring, lanes = self.ring, range(len(self.ring.lanes))

        @pl.when(self.core == 0)
        def _() -> None:
            barrier([self.peers.behind(i) for i in lanes])
            self.passing.begin(whole)

        for term in self.terms:
            term.stream.begin(term.turn(np.int32(0), np.int32(0)))
        self._fetch(np.int32(0))
        lax.fori_loop(np.int32(0), np.int32(ring.panels), self._panel, None)
        for term in self.terms:
            end = term.turn(np.int32(ring.panels), np.int32(0))
            term.settle(end.last_but_one())
            term.settle(end.previous())

        pl.when(self.core == 0)(lambda: self.passing.finish(whole))

    def _panel(self, p: Scalar, _: None) -> None:
        ring = self.ring
        h, block = ring.place(p)
        if self.terms:
            ring.each(h, lambda i: self._copy(i, p).wait())
        else:
            self._fetch_next(p)
        lanes = range(len(ring.lanes))
        rows = [ring.first_row(self.peers.me, i, h, block) for i in lanes]
        for term in self.terms:
            last = term is self.terms[-1]

            def tile(j: Scalar, _: None, term: _Term = term, last: bool = last) -> None:
                turn = term.turn(p, j)
                if last:
                    pl.when(j == term.count - 1)(lambda: self._fetch_next(p))
                term.stream.begin(turn.next())
                term.settle(turn.last_but_one())
                x = self.held.at[p & np.int32(1)]
                pl.when(term.columns.exists(turn))(lambda: term.make(turn, x, rows))

            lax.fori_loop(np.int32(0), np.int32(term.count), tile, None)

    def _fetch_next(self, p: Scalar) -> None:
        pl.when(p + 1 < self.ring.panels)(lambda: self._fetch(p + np.int32(1)))

    def _fetch(self, p: Scalar) -> None:
        """Begins to bring the rows of panel p to where they are multiplied."""
        ring = self.ring
        h, block = ring.place(p)

        def arriving(i: int) -> None:
            pl.when(block == 0)(lambda: self._receive(i, h))
            if self.terms:
                self._copy(i, p).start()

        ring.each(h, arriving, h > 0)
        if self.terms:
            ring.each(h, lambda i: self._copy(i, p, own=True).start(), h == 0)

    def _receive(self, i: int, h: Scalar) -> None:
        """Waits for the rows of hop h, sends them on, and tells other cores."""
        told = self.told.at[i, h - 1]

        @pl.when(self.core == 0)
        def _() -> None:
            self.passing.on(i, h)
            for core in range(1, self.cores):
                pl.semaphore_signal(told, 1, core_index=core)

        if self.cores > 1:
            pl.when(self.core != 0)(lambda: pl.semaphore_wait(told, 1))

    def _copy(self, i: int, p: Scalar, own: bool = False) -> Any:
        """The rows of lane i in panel p, on their way to be multiplied."""
        ring, slot = self.ring, p & np.int32(1)
        h, block = ring.place(p)
        start = np.int32(ring.bounds[i][0]) + block * np.int32(ring.heights[i])
        row = start if own else ring.first_row(self.peers.me, i, h, block)
        rows = (self.x if own else self.gathered).at[ring.rows(row, ring.heights[i])]
        held = self.held.at[slot, ring.within(i)]
        return pltpu.make_async_copy(rows, held, self.copied.at[i, slot])

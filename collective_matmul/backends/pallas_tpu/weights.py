"""Weights in HBM, brought to a core tile by tile, one ahead of the product."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from collective_matmul.backends.pallas_tpu.ring import Scalar
from collective_matmul.backends.pallas_tpu.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class Weights:
    """One product's right operand, and how it is multiplied.

    Args:
      k, n: sizes, of the product.
      dtype: of the operand.
      transposed: it is [n, k].
      tiles: of a panel's product.
      acc: dtype in which products are summed.
      precision: as in `lax.dot_general`.
    """

    k: int
    n: int
    dtype: np.dtype
    transposed: bool
    tiles: Tiles
    acc: np.dtype
    precision: Any

    @property
    def scratch(self) -> list[Any]:
        """What a `Stream` needs of a core."""
        slots, width = self.tiles.slots, self.tiles.width
        shape = (slots, width, self.k) if self.transposed else (slots, self.k, width)
        return [pltpu.VMEM(shape, self.dtype), pltpu.SemaphoreType.DMA((slots,))]

    def bytes_read(self, panels: int) -> int:
        """From HBM, in so many panels."""
        return self.k * self.n * self.dtype.itemsize * (1 if self.tiles.resident else panels)

    def flops(self, rows: int) -> int:
        """Of the products of so many rows."""
        return 2 * rows * self.k * self.n


class Turn(NamedTuple):
    """A core's turn: a tile of a panel.

    Args:
      panel, tile: numbers, the tile's within the panel.
      tiles: of a panel that are this core's.
    """

    panel: Scalar
    tile: Scalar
    tiles: int

    @property
    def slot(self) -> Scalar:
        """Which of two places is its own."""
        return (self.panel * np.int32(self.tiles) + self.tile) & np.int32(1)

    def next(self) -> Turn:
        """The turn after it."""
        ended = self.tile == self.tiles - 1
        panel = self.panel + ended.astype(np.int32)
        return Turn(panel, jnp.where(ended, np.int32(0), self.tile + np.int32(1)), self.tiles)

    def previous(self) -> Turn:
        """The turn before it; the panel may be negative."""
        began = self.tile == 0
        tile = self.tile - np.int32(1) + jnp.where(began, np.int32(self.tiles), np.int32(0))
        return Turn(self.panel - began.astype(np.int32), tile, self.tiles)

    def last_but_one(self) -> Turn:
        """The turn two before it, which had the same place; the panel may be negative."""
        return self.previous().previous()


class Columns:
    """Which columns a core makes when.

    Args:
      tiles: that the cores take in turns.
      core, cores: which of how many.
    """

    def __init__(self, tiles: Tiles, core: Scalar, cores: int) -> None:
        self._tiles, self._core, self._cores = tiles, core, cores

    def exists(self, turn: Turn) -> Any:
        """Whether there is a tile for this core's turn."""
        even = self._tiles.total % self._cores == 0
        return (turn.panel >= 0) & (even | (self._number(turn.tile) < self._tiles.total))

    def at(self, turn: Turn) -> Any:
        """The columns of that tile."""
        width = self._tiles.width
        return pl.ds(pl.multiple_of(self._number(turn.tile) * np.int32(width), width), width)

    def _number(self, tile: Scalar) -> Scalar:
        return tile * np.int32(self._cores) + self._core


class Stream:
    """Weights on their way, within a kernel.

    Args:
      weights: what is known of them.
      refs: the operand, and the references of `Weights.scratch`.
      columns: of this core.
      panels: in which they are multiplied.
    """

    def __init__(
        self, weights: Weights, refs: tuple[Any, Any, Any], columns: Columns, panels: int
    ) -> None:
        self._w, self._held, self._arrived = refs
        self._weights, self._columns = weights, columns
        self._panels = 1 if weights.tiles.resident else panels

    def begin(self, turn: Turn) -> None:
        """Starts to bring a turn's tile, if it is not there already."""
        wanted = (turn.panel < self._panels) & self._columns.exists(turn)
        pl.when(wanted)(lambda: self._copy(turn).start())

    def arrive(self, turn: Turn) -> None:
        """Waits for a turn's tile.

        Before anything is read for the product: what is read ahead of a branch is spilled.
        """
        pl.when(turn.panel < self._panels)(lambda: self._copy(turn).wait())

    def product(self, x: jax.Array, turn: Turn) -> jax.Array:
        """`x . w[:, tile]`, [rows, width], not rounded; the tile has arrived."""
        weights = self._weights
        return lax.dot_general(
            x,
            self._held[self._slot(turn)],
            (((1,), (1 if weights.transposed else 0,)), ((), ())),
            precision=weights.precision,
            preferred_element_type=weights.acc,
        )

    def _slot(self, turn: Turn) -> Scalar:
        return turn.tile if self._weights.tiles.resident else turn.slot

    def _copy(self, turn: Turn) -> Any:
        every, part = slice(None), self._columns.at(turn)
        at = (part, every) if self._weights.transposed else (every, part)
        slot = self._slot(turn)
        return pltpu.make_async_copy(self._w.at[at], self._held.at[slot], self._arrived.at[slot])

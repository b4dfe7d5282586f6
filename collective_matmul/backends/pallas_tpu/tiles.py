"""How a panel's product is cut so that what a kernel holds at once fits on the chip.

A core makes tiles of a panel's result, each `width` columns of it, of all rows of the panel and the
whole contracted size. So nothing is added up in passes, and a tile of weights is read once a panel,
or only once where a core can keep them all. Of what is on its way two are held: one is worked on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from collective_matmul.backends.pallas_tpu.machine import Machine
from collective_matmul.backends.pallas_tpu.ring import Ring

COLUMNS = 128  # of a register: what a tile's width is a multiple of on a TPU
REGISTER = 32  # bytes of a register's column: 8 rows of 4 bytes, 16 of 2
LARGEST = 2**32  # multiplications of a tile: one straight line of a program, compiled in seconds
TALLEST = 1024  # rows of a panel: more make no product faster
SMALLEST = 2**27  # multiplications of a tile that are worth a turn: 2,048 cycles on v4
FINE = 4  # tiles of a core in a scatter's round, so that sums travel while others are made
SPILLED = 1.07  # of a panel's rows: 15.98 MiB of 1,024 x 7,680 on v5p, 3.91 of 512 x 3,840 on v4
SIGNALS = 384  # of a core's 512 semaphores, those for sums that arrive
PANELS = (1, 2, 4, 8, 16, 32)  # into which a round may be cut


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of a kernel, in sizes: `[rows, k] . [k, n]`.

    Args:
      k, n: of it.
      itemsize: bytes of a number of its operands.
      written: bytes on chip of a number of the result, in all buffers that hold a tile of it.
      weighted: there are weights; otherwise it is the rows themselves.
    """

    k: int
    n: int
    itemsize: int
    written: int
    weighted: bool = True


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How one product's columns are cut.

    Args:
      width: columns of a tile.
      total: tiles, of all cores, which take them in turns.
      count: turns of a core; the last one may find no tile.
      resident: a core keeps its weights from panel to panel.
    """

    width: int
    total: int
    count: int
    resident: bool

    @property
    def slots(self) -> int:
        """Tiles of weights that a core holds."""
        return self.count if self.resident else 2


Cut = tuple[Ring, tuple[Tiles, ...]]


def cut(machine: Machine, ring: Ring, products: Sequence[Product], *, fine: bool) -> Cut | str:
    """The ring cut into panels, and the tiles of each product; or why there are none.

    Args:
      machine: what they must fit on.
      ring: with a round in one block.
      products: of a panel's rows.
      fine: as many tiles of a round as let sums travel while others are made, on all cores alike.
    """
    if reason := None if machine.interpret else misaligned(ring, products):
        return reason
    found: list[Cut] = []
    least, why = math.inf, ""
    for panels in _panels(machine, ring, products):
        spilled = _spilled(machine, panels, products) if fine else 0
        for resident in (True, False):
            for cap in _widths(machine, max(x.n for x in products)):
                tiles = tuple(_tiles(machine, panels, x, cap, resident, fine) for x in products)
                needed = _needed(panels, products, tiles) + spilled
                refusal = _refusal(machine, panels, products, tiles, fine)
                why = refusal or why
                if needed > machine.vmem:
                    least = min(least, needed)
                elif not refusal:
                    found.append((panels, tiles))
    if found:
        # Of equals the first.
        return min(found, key=lambda each: (_padding(machine, each[1]), fine and _shared(*each)))
    return why or (
        f"{ring.height} rows a round of k={max(x.k for x in products)} need at least "
        f"{least / 2**20:.1f} MiB on chip, of {machine.vmem / 2**20:.1f} that a kernel may use"
    )


def _padding(machine: Machine, tiles: Sequence[Tiles]) -> float:
    """How many times as many columns the matrix units work on, for they are filled up."""
    filled = sum(x.total * -(-x.width // machine.unit) * machine.unit for x in tiles)
    return filled / sum(x.total * x.width for x in tiles)


def _panels(machine: Machine, ring: Ring, products: Sequence[Product]) -> list[Ring]:
    """The ring with its rounds in more and more blocks, none too tall where they can be cut."""
    step = 1 if machine.interpret else REGISTER // products[0].itemsize
    found = [
        dataclasses.replace(ring, blocks=blocks)
        for blocks in PANELS
        if not any(height % (blocks * step) for height in ring.heights)
    ]
    return [x for x in found if x.height <= TALLEST] or found[-1:]


def _refusal(
    machine: Machine, ring: Ring, products: Sequence[Product], tiles: Sequence[Tiles], fine: bool
) -> str | None:
    """Why these tiles will not do, whatever they need on chip."""
    if fine and tiles[0].total % machine.cores:
        return f"{products[0].n} columns do not split over {machine.cores} cores"
    if fine and not together(ring, tiles[0].count):
        return f"sums over {ring.rounds} hops need more semaphores than the {SIGNALS} there are"
    if tiles[0].resident and any(_small(ring, *each) for each in zip(products, tiles, strict=True)):
        return "what stays on chip leaves no room for tiles worth a turn"
    return None


def together(ring: Ring, turns: int) -> int:
    """Tiles of a scatter's round, of so many turns a panel, whose sums arrive under one semaphore:
    a power of two, 0 if there are too few semaphores.

    They are waited for together, for nothing says which of them has arrived. A round has two such
    groups at least: a device waits for a round's first group before it sends its last tile.
    """
    there = SIGNALS // (len(ring.lanes) * max(1, ring.rounds))
    found = 1
    while (groups := -(-ring.blocks * turns // found)) > there > 1:
        found *= 2
    return found if groups <= there else 0


def _shared(ring: Ring, tiles: Sequence[Tiles]) -> bool:
    return together(ring, tiles[0].count) > 1


def _small(ring: Ring, product: Product, tiles: Tiles) -> bool:
    work = ring.height * product.k * tiles.width
    return work < SMALLEST and tiles.count > 1


def misaligned(ring: Ring, products: Sequence[Product]) -> str | None:
    """Why a TPU's kernel cannot copy rows of these sizes, or None."""
    rows = REGISTER // products[0].itemsize
    if ring.alignment % rows:
        return f"the rows of a hop, {', '.join(map(str, ring.heights))}, are no multiples of {rows}"
    for size in {size for x in products for size in (x.k, x.n)}:
        if size % COLUMNS:
            return f"{size} columns are not a multiple of {COLUMNS}, the lanes of a register"
    return None


def _tiles(
    machine: Machine, ring: Ring, product: Product, cap: int, resident: bool, fine: bool
) -> Tiles:
    """Of tiles no wider than `cap`, those that the cores share most evenly, the widest first."""
    most = min(cap, LARGEST // max(1, ring.height * product.k))
    widths = _widths(machine, product.n)
    if fine:  # and all cores must have a tile in each turn
        most = min(most, product.n // (-(-FINE // ring.blocks) * machine.cores))
        even = tuple(w for w in widths if product.n // w % machine.cores == 0)
        widths = even or widths
    fitting = [w for w in widths if w <= most] or widths[-1:]

    def turns(width: int) -> int:
        return -(-product.n // width // machine.cores)

    width = min(fitting, key=lambda width: width * turns(width))
    return Tiles(width, product.n // width, turns(width), resident)


def _widths(machine: Machine, n: int) -> tuple[int, ...]:
    """Of tiles that make up n columns, the widest first."""
    return _divisors(n, 1 if machine.interpret else COLUMNS)


@functools.cache
def _divisors(n: int, step: int) -> tuple[int, ...]:
    return tuple(w for w in range(n // step * step, 0, -step) if n % w == 0)


def _needed(ring: Ring, products: Sequence[Product], tiles: Sequence[Tiles]) -> int:
    """Bytes on chip of a core: rows twice, weights, results."""
    rows = 2 * ring.height * sum(k * size for k, size in {(x.k, x.itemsize) for x in products})
    cells = zip(products, tiles, strict=True)
    return rows + sum(
        x.width * (x.slots * p.k * p.itemsize * p.weighted + ring.height * p.written)
        for p, x in cells
    )


def _spilled(machine: Machine, ring: Ring, products: Sequence[Product]) -> int:
    """Bytes on chip that a scatter needs beyond what a kernel's arrays leave: it reads its rows
    before it multiplies them, and the compiler spills them all."""
    if machine.interpret:
        return 0
    rows = ring.height * sum(x.k * x.itemsize for x in products)
    return max(0, int(SPILLED * rows) - machine.spare)

"""Rings on a physical torus: functions of coordinates, and `Slice`, which reads them off devices.

A slice of TPUs is a grid of chips in which neighbours share a link; in some slices the two ends of
an axis are linked too (*wrap*). A coordinate is `(x, y, z, core)`: the devices of one chip are an
inner axis. Permutes along a mesh axis are fastest when the devices of the axis, in their order,
form a cycle of neighbours. A box of the grid has such a cycle if and only if

- it is a line of 2, or a whole axis that wraps, or
- it extends in two or more dimensions, and its volume is even or one of its axes wraps

(a grid of odd volume has one more device of one chessboard colour than of the other).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

Coord = tuple[int, ...]


def wraps(device_kind: str, shape: Coord) -> tuple[bool, ...]:
    """Which axes of a slice of `shape = (x, y, z, core)` are linked end to end.

    v4, v5p and 7x are built of 4x4x4 cubes: a slice of whole cubes wraps on every axis, a smaller
    one on none. v5e and v6e wrap the axes of 16 chips. Slices that were asked for as *twisted* tori
    wrap with an offset that coordinates do not show. An unknown kind is taken not to wrap.

    Reference: https://docs.cloud.google.com/tpu/docs/v4, https://docs.cloud.google.com/tpu/docs/v5p
    and https://jax-ml.github.io/scaling-book/tpus/
    """
    *chips, _ = shape
    if device_kind in ("TPU v4", "TPU v5", "TPU v5p", "TPU7x"):
        cubes = all(n % 4 == 0 for n in chips)
        return (*(cubes for _ in chips), False)
    if device_kind in ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e"):
        return (*(n == 16 for n in chips), False)
    return (False,) * len(shape)


def distance(a: Coord, b: Coord, shape: Coord, wrap: tuple[bool, ...]) -> int:
    """Links on the shortest way from `a` to `b`."""
    ways = (abs(i - j) for i, j in zip(a, b, strict=True))
    return sum(
        min(way, n - way) if around else way
        for way, n, around in zip(ways, shape, wrap, strict=True)
    )


def closes(box: Coord, wrap: tuple[bool, ...]) -> bool:
    """Whether the devices of `box` can be ordered as a cycle of neighbours (see the module)."""
    extended = [(n, around) for n, around in zip(box, wrap, strict=True) if n > 1]
    if len(extended) > 1:
        return math.prod(box) % 2 == 0 or any(around for _, around in extended)
    return all(n == 2 or around for n, around in extended)


def ring_order(box: Coord, wrap: tuple[bool, ...]) -> list[Coord]:
    """All coordinates of `box`, each a neighbour of the one before; the last of the first as well
    wherever that is possible (`closes`), else they are a path.

    Args:
      box: extent in each dimension.
      wrap: whether the two ends of that dimension of the box are neighbours.
    """
    if sum(n > 1 for n in box) < 2 or not closes(box, wrap):
        return _snake(box)
    # Two dimensions are enough: the columns are one axis, the rows a snake through all the others.
    # The cycle goes out along row 0 and comes back, column by column, through the other rows. For
    # an odd number of columns it takes the last column first, steps around to column 0, and comes
    # back row by row.
    even = math.prod(box) % 2 == 0
    c = next(i for i, n in enumerate(box) if n > 1 and (n % 2 == 0 if even else wrap[i]))
    lines = _snake((*box[:c], 1, *box[c + 1 :]))
    m, n = len(lines), box[c]
    order = [(0, column) for column in range(n)]
    if even:
        for column in reversed(range(n)):
            down = (n - 1 - column) % 2 == 0
            order += [(row, column) for row in (range(1, m) if down else range(m - 1, 0, -1))]
    else:
        order += [(row, n - 1) for row in range(1, m)]
        for row in reversed(range(1, m)):
            right = (m - 1 - row) % 2 == 0
            order += [(row, column) for column in (range(n - 1) if right else range(n - 2, -1, -1))]
    return [(*lines[row][:c], column, *lines[row][c + 1 :]) for row, column in order]


def _snake(box: Coord) -> list[Coord]:
    """A path through the box that turns round at its walls."""
    if not box:
        return [()]
    inner = _snake(box[1:])
    return [(i, *rest) for i in range(box[0]) for rest in (inner if i % 2 == 0 else inner[::-1])]


def place(shape: Coord, wrap: tuple[bool, ...], sizes: tuple[int, ...]) -> list[list[Coord]]:
    """Lays mesh axes onto the torus: the first axis gets the best boxes, the last what is left.

    The devices of axis 0 form boxes that tile the torus; those of axis 1 boxes of such boxes, and
    so on. Boxes are chosen for the shortest longest step of their ring, then to keep the devices of
    a chip together, then for few links in all, then to cut few torus axes, for axis 0 first.

    Args:
      shape: the torus. Its volume is the product of `sizes`.
      wrap: whether an axis is linked end to end.
      sizes: sizes of the mesh axes, the one that communicates most first.

    Returns:
      For each mesh axis its coordinates in ring order; the device at mesh indices `i, j, ..` stands
      at the sum of `result[0][i], result[1][j], ..`.

    Raises:
      ValueError: if the volume and the sizes differ.
    """
    if math.prod(shape) != math.prod(sizes):
        raise ValueError(f"axes of {sizes} do not fill a torus of {shape}")
    ones = (1,) * len(shape)
    _, chosen = _choose(shape, wrap, ones, sizes)
    placed, stride = [], ones
    for box in chosen:
        ends = _ends(shape, wrap, stride, box)
        placed.append([_scale(at, stride) for at in ring_order(box, ends)])
        stride = _scale(stride, box)
    return placed


_Key = tuple[tuple[int, ...], tuple[int, ...]]  # (how far the steps are, how the boxes look)


def _choose(
    shape: Coord, wrap: tuple[bool, ...], stride: Coord, sizes: tuple[int, ...]
) -> tuple[_Key, tuple[Coord, ...]]:
    if not sizes:
        return ((), ()), ()
    free = tuple(n // s for n, s in zip(shape, stride, strict=True))
    options = []
    for box in _boxes(free, sizes[0]):
        (steps, looks), others = _choose(shape, wrap, _scale(stride, box), sizes[1:])
        longest, total = _steps(shape, wrap, stride, box)
        split_chip = int(box[-1] < free[-1])
        cuts = sum(1 < n < limit for n, limit in zip(box, free, strict=True))
        key = ((longest, split_chip, total, *steps), (cuts, sum(box), *looks))
        options.append((key, (box, *others)))
    return min(options)


@functools.cache
def _steps(shape: Coord, wrap: tuple[bool, ...], stride: Coord, box: Coord) -> tuple[int, int]:
    """The longest step and the sum of all steps of the ring through `box`, in links."""
    ring = ring_order(box, _ends(shape, wrap, stride, box))
    ring = [_scale(at, stride) for at in ring]
    steps = [distance(a, b, shape, wrap) for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
    return max(steps), sum(steps)


def _ends(shape: Coord, wrap: tuple[bool, ...], stride: Coord, box: Coord) -> tuple[bool, ...]:
    """Which dimensions of a box of strided coordinates reach around the torus."""
    reach = _scale(stride, box)
    return tuple(w and r == n for w, r, n in zip(wrap, reach, shape, strict=True))


def _scale(a: Coord, b: Coord) -> Coord:
    return tuple(i * j for i, j in zip(a, b, strict=True))


def _boxes(shape: Coord, size: int) -> Iterator[Coord]:
    """Boxes of volume `size` whose copies tile `shape`."""
    if not shape:
        if size == 1:
            yield ()
        return
    for n in range(1, shape[0] + 1):
        if shape[0] % n == 0 and size % n == 0:
            yield from ((n, *rest) for rest in _boxes(shape[1:], size // n))


def coordinates(device: Any) -> Coord | None:
    """`(x, y, z, core)` of a jax device; None on hardware that is no torus."""
    if device.platform != "tpu" or not hasattr(device, "coords"):
        return None
    return (*device.coords, device.core_on_chip)


def slice_number(device: Any) -> Hashable:
    """Which slice a jax device is part of; a slice that is alone carries no number."""
    return getattr(device, "slice_index", 0)


@dataclasses.dataclass(frozen=True)
class Slice:
    """The torus that devices stand on: its extent, and where it wraps."""

    shape: Coord
    wrap: tuple[bool, ...]

    @classmethod
    def of(cls, devices: Iterable[Any]) -> Slice | None:
        """The whole slice of these devices, even if they are a part; None without coordinates."""
        devices = list(devices)
        if any(coordinates(device) is None for device in devices):
            return None
        first = devices[0]
        everyone = first.client.devices() if hasattr(first, "client") else devices
        mates = [d for d in everyone if slice_number(d) == slice_number(first)]
        spans = zip(*(coordinates(device) or () for device in mates), strict=True)
        shape = tuple(max(span) - min(span) + 1 for span in spans)
        return cls(shape, wraps(first.device_kind, shape))

    def links(self, a: Any, b: Any) -> float:
        """Links on the shortest way between two devices; infinite from slice to slice."""
        start, end = coordinates(a), coordinates(b)
        if start is None or end is None or slice_number(a) != slice_number(b):
            return math.inf
        return distance(start, end, self.shape, self.wrap)

    def __str__(self) -> str:
        *chips, cores = self.shape
        around = ", ".join(name for name, w in zip("xyz", self.wrap, strict=False) if w)
        pairs = f", {cores} devices a chip" if cores > 1 else ""
        return f"{'x'.join(map(str, chips))}{pairs} (wraps: {around or 'no axis'})"

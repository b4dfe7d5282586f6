"""Meshes of ("data", "fsdp", "tensor"), with the tensor axis on neighbours of the physical torus.

A collective matmul sends its chunks from one device of the tensor axis to the next, so the order
of the devices on that axis decides whether a step is one link long. `make_mesh` chooses the order;
`ring_report` and `check_ring` say, for any mesh, which steps are longer.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from collective_matmul import torus

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
    axis_types: AxisType | tuple[AxisType, ...] | None = None,
) -> Mesh:
    """A mesh with the axes `("data", "fsdp", "tensor")`, in this order.

    On TPUs the devices of the tensor axis form boxes of the torus, ordered as cycles of neighbours
    wherever such a cycle exists (`torus.closes`), else as a path, which `check_ring` reports. The
    fsdp axis gets boxes of what is left, with short steps; the data axis the rest. Several slices,
    which no torus link joins, are told apart by the data axis.

    Elsewhere the devices keep their order, tensor innermost. `jax.devices()` lists one process
    after the other, so the tensor axis stays inside a process wherever its size divides the number
    of devices of each.

    Args:
      data: size of the axis that cuts the batch alone. At most one size may be -1: what is left.
      fsdp: size of the axis that cuts the batch and the parameters.
      tensor: size of the axis of the collective matmuls.
      devices: devices to use; by default all of them.
      axis_types: one type for all axes, or one for each; by default `AxisType.Auto`.

    Returns:
      The mesh, of shape (data, fsdp, tensor).

    Raises:
      ValueError: if the sizes do not multiply to the number of devices (with the nearest that do).
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes((data, fsdp, tensor), len(devices))
    types = axis_types if isinstance(axis_types, tuple) else (axis_types or AxisType.Auto,) * 3
    slices = collections.defaultdict(list)
    for device in devices:
        slices[torus.slice_number(device)].append(device)
    parts = [_on_torus(part, sizes, len(slices)) for part in slices.values()]
    placed = [part for part in parts if part is not None]
    array = np.concatenate(placed) if len(placed) == len(parts) else _array(devices, sizes)
    return Mesh(array, AXES, axis_types=types)


@dataclasses.dataclass(frozen=True)
class Ring:
    """The devices of a mesh axis that exchange chunks, in their order."""

    devices: tuple[jax.Device, ...]
    hops: tuple[float, ...] | None
    """Links from each to the next, and from the last to the first. None: hardware does not tell."""

    @property
    def far(self) -> list[tuple[jax.Device, jax.Device, float]]:
        """The pairs that are not neighbours, with the links between them."""
        following = self.devices[1:] + self.devices[:1]
        steps = zip(self.devices, following, self.hops or (), strict=False)
        return [step for step in steps if step[2] > 1]


@dataclasses.dataclass(frozen=True)
class RingReport:
    """What `ring_report` found; `str()` of it is for people."""

    axis: str
    size: int
    hardware: str
    rings: tuple[Ring, ...]

    @property
    def closed(self) -> bool | None:
        """Whether every step of every ring is one link long; None where that cannot be told."""
        if any(ring.hops is None for ring in self.rings):
            return None
        return not any(ring.far for ring in self.rings)

    def __str__(self) -> str:
        head = (
            f"axis {self.axis}: {_count(len(self.rings), 'ring')} of {self.size} on {self.hardware}"
        )
        if self.size == 1:
            return f"{head}: nothing travels"
        if self.closed is None:
            spread = sum(len({d.process_index for d in ring.devices}) > 1 for ring in self.rings)
            return (
                f"{head}: it reports no coordinates, so neighbours cannot be told; "
                f"rings that cross from process to process: {spread}"
            )
        if self.closed:
            return f"{head}: every step is one link, and the last device is linked to the first"
        lines = [f"{head}:"]
        for hops, count in collections.Counter(ring.hops for ring in self.rings).most_common(4):
            lines.append(f"  {_count(count, 'ring')} with steps of {_steps(hops or ())} links")
        far = [step for ring in self.rings for step in ring.far]
        lines += [f"  {_name(a)} -> {_name(b)} is {_links(hops)}" for a, b, hops in far[:8]]
        if far[8:]:
            lines.append(f"  and {len(far) - 8} more pairs that are not neighbours")
        return "\n".join(lines)


def ring_report(mesh: Mesh, axis: str | tuple[str, ...] = "tensor") -> RingReport:
    """How far apart the neighbours on a mesh axis are on the physical torus.

    Args:
      mesh: any mesh, from `make_mesh` or not.
      axis: a mesh axis, or several that are used as one, in mesh order.

    Raises:
      ValueError: if the mesh has no such axis.
    """
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    if missing := [name for name in names if name not in mesh.axis_names]:
        raise ValueError(f"no axis {missing[0]!r} in a mesh with the axes {mesh.axis_names}")
    size = math.prod(mesh.shape[name] for name in names)
    numbers = [mesh.axis_names.index(name) for name in names]
    last = range(mesh.devices.ndim - len(names), mesh.devices.ndim)
    rows = np.moveaxis(mesh.devices, numbers, last).reshape(-1, size)
    whole = torus.Slice.of(mesh.devices.flat)
    rings = []
    for row in rows:
        pairs = zip(row, np.roll(row, -1), strict=True)
        hops = tuple(whole.links(a, b) for a, b in pairs) if whole else None
        rings.append(Ring(tuple(row), hops))
    kind = mesh.devices.flat[0].device_kind
    hardware = f"{kind} {whole}" if whole else kind
    return RingReport(", ".join(names), size, hardware, tuple(rings))


def check_ring(
    mesh: Mesh, axis: str | tuple[str, ...] = "tensor", *, strict: bool = False
) -> RingReport:
    """Warns if neighbours on a mesh axis are not neighbours on the torus; returns the report.

    Args:
      mesh: any mesh.
      axis: a mesh axis, or several that are used as one.
      strict: raise instead of warning.

    Raises:
      ValueError: with `strict`, if a step is longer than one link (with the pairs); not where the
        hardware does not tell. And if the mesh has no such axis.
    """
    report = ring_report(mesh, axis)
    if report.closed is False:
        message = (
            f"{report}\nSteps of several links share them with other steps. Build the mesh with "
            "make_mesh, or choose a size that is a whole axis that wraps, or an even box."
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    return report


def _on_torus(devices: list[Any], sizes: tuple[int, ...], slices: int) -> np.ndarray | None:
    """The devices of one of the slices as its part of the mesh; None if they are no box of it."""
    whole = torus.Slice.of(devices)
    if whole is None:
        return None
    data, fsdp, tensor = sizes
    if data % slices:
        raise ValueError(
            f"data={data} does not split over {slices} slices, and no other axis may cross from "
            f"slice to slice: choose a multiple of {slices}"
        )
    at = {torus.coordinates(device): device for device in devices}
    grid = np.array(list(at))
    low, box = grid.min(axis=0), tuple(int(n) for n in np.ptp(grid, axis=0) + 1)
    if not math.prod(box) == len(devices) == data // slices * fsdp * tensor:
        return None
    wrap = tuple(w and n == m for w, n, m in zip(whole.wrap, box, whole.shape, strict=True))
    steps = torus.place(box, wrap, (tensor, fsdp, data // slices))
    order = [
        at[tuple((low + np.sum(step, axis=0)).tolist())]
        for step in itertools.product(*reversed(steps))
    ]
    return _array(order, (data // slices, fsdp, tensor))


def _array(devices: Sequence[Any], sizes: tuple[int, ...]) -> np.ndarray:
    array = np.empty(len(devices), dtype=object)
    array[:] = devices
    return array.reshape(sizes)


def _sizes(asked: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The sizes with -1 filled in; ValueError unless they multiply to `count`."""
    text = ", ".join(f"{name}={size}" for name, size in zip(AXES, asked, strict=True))
    if any(size < 1 and size != -1 for size in asked) or asked.count(-1) > 1:
        raise ValueError(f"sizes are positive, and at most one is -1 (what is left): got {text}")
    known = math.prod(size for size in asked if size != -1)
    sizes = tuple(count // known if size == -1 else size for size in asked)
    if math.prod(sizes) == count:
        return sizes
    product = " x ".join(str(size) for size in asked if size != -1)
    raise ValueError(
        f"{text}: {product} = {known} does not {'divide' if -1 in asked else 'equal'} the "
        f"{_count(count, 'device')} there are; nearest: {'; '.join(_nearest(asked, count))}"
    )


def _nearest(asked: tuple[int, ...], count: int) -> list[str]:
    """Sizes that do multiply to `count`, those that change the fewest and the least first."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]

    def change(sizes: tuple[int, ...]) -> tuple[float, ...]:
        ratios = [abs(math.log(n / a)) for n, a in zip(sizes, asked, strict=True) if a != -1]
        return (sum(ratio > 0 for ratio in ratios), sum(ratios))

    pairs = ((d, f) for d in divisors for f in divisors if count % (d * f) == 0)
    best = sorted(((d, f, count // (d * f)) for d, f in pairs), key=change)[:3]
    return [", ".join(f"{a}={n}" for a, n in zip(AXES, sizes, strict=True)) for sizes in best]


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _links(hops: float) -> str:
    return "in another slice" if math.isinf(hops) else f"{hops:.0f} links away"


def _steps(hops: tuple[float, ...]) -> str:
    shown = ", ".join("no" if math.isinf(h) else f"{h:.0f}" for h in hops[:16])
    return f"{shown}, .." if hops[16:] else shown


def _name(device: Any) -> str:
    return f"device {device.id} at {torus.coordinates(device)}"

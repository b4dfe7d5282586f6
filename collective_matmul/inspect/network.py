"""Where the partitions of a program stand, and what a collective costs on the links between them.

Partition `i` of a compiled program is `mesh.devices.flat[i]`. On a TPU its coordinates say which
links its messages cross; elsewhere every mesh axis is taken to be a ring of its own (`assumed`),
or, on a switch, every device to have one port. The model of a transfer is

    seconds = latency + bytes over the busiest directed link / bandwidth of that link
    latency = permute_latency + (links on the longest way - 1) * hop_latency

A permute's bytes are routed pair by pair (`routes`), those of an all-to-all likewise; the other
collectives use all the links of their groups (`boxes`). The devices of a chip share its links, and
have one between themselves that is six times as fast.

Reference: https://jax-ml.github.io/scaling-book/sharding/ and
https://docs.cloud.google.com/tpu/docs/tpu7x (the link between the two devices of a chip).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from collective_matmul.hardware import IN_CHIP, Chip
from collective_matmul.inspect.boxes import spread
from collective_matmul.inspect.collectives import Collective
from collective_matmul.inspect.routes import Grid
from collective_matmul.torus import Slice, coordinates, slice_number

ALL_TO_ALL = ("all-to-all", "ragged-all-to-all")
SLICES = "it crosses from slice to slice, where no link's speed is known"


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
    """What a collective's messages cross, whatever their size."""

    axes: str  # mesh axes that they move along: "tensor", "data,fsdp"; "" if nothing moves
    way: str  # "+" or "-" around the axes for a permute, "" for both
    links: np.ndarray  # float64 [links]: seconds on each directed link for one byte
    latency: float  # s
    hops: int  # links on the longest way
    names: tuple[str, ...] = ()  # kinds of links in use: ("x+", "y-")
    unknown: str = ""  # why no time can be told

    @property
    def seconds_per_byte(self) -> float:
        """Of the busiest link."""
        return float(self.links.max(initial=0.0))


@dataclasses.dataclass(frozen=True, eq=False)
class Traffic:
    """One collective on the links: `seconds` if it is alone there."""

    route: Route
    bytes: int  # `Collective.shard_bytes`

    @property
    def seconds(self) -> float:
        """Latency, and the time of the busiest link."""
        return self.route.latency + self.bytes * self.route.seconds_per_byte


class Network:
    """The links of a slice, a switch, or what is assumed of neither.

    Args:
      chip: rates and latencies.
      grid: the links.
      positions: int `[partitions, dimensions]`, on the grid.
      names: of the grid's dimensions.
      axes: {mesh axis: size}, in mesh order; the partitions are counted in that order.
      devices_share: the grid is a torus: its first dimension is the slice, its last one that of the
        devices of a chip, which share the chip's links.
      assumed: what was assumed for want of coordinates, "" if nothing.
    """

    def __init__(
        self,
        chip: Chip,
        grid: Grid,
        positions: np.ndarray,
        names: tuple[str, ...],
        axes: dict[str, int],
        *,
        devices_share: bool = False,
        assumed: str = "",
    ):
        self.chip = chip
        self.grid = grid
        self.positions = positions
        self.names = names
        self.axes = axes
        self.devices_share = devices_share
        self.assumed = assumed
        self.indices = np.stack(np.unravel_index(np.arange(len(positions)), [*axes.values()]), 1)
        self.route = functools.lru_cache(maxsize=None)(self._route)
        self.slowdowns = functools.lru_cache(maxsize=None)(self._slowdowns)

    @classmethod
    def of(cls, devices: Iterable[Any], axes: dict[str, int], chip: Chip) -> Network:
        """The network of these devices, in the order of the partitions.

        Args:
          devices: jax devices; those of a compile-only topology as well.
          axes: {mesh axis: size} whose product is the number of devices.
          chip: their row of the table.
        """
        devices = list(devices)
        slices = sorted({slice_number(device) for device in devices}, key=str)
        wholes = [Slice.of([d for d in devices if slice_number(d) == number]) for number in slices]
        if chip.switched or any(whole is None for whole in wholes):
            return cls.without_coordinates(axes, chip)
        whole = max((w for w in wholes if w is not None), key=lambda w: w.shape)
        grid = Grid((len(slices), *whole.shape), (False, *whole.wrap))
        positions = np.array(
            [(slices.index(slice_number(d)), *(coordinates(d) or ())) for d in devices]
        )
        positions[:, 1:] %= whole.shape
        return cls(
            chip, grid, positions, ("slice", "x", "y", "z", "core"), axes, devices_share=True
        )

    @classmethod
    def without_coordinates(cls, axes: dict[str, int], chip: Chip) -> Network:
        """Devices that do not say where they stand: a ring for each mesh axis, or a switch."""
        shape = tuple(axes.values())
        count = math.prod(shape)
        positions = np.stack(np.unravel_index(np.arange(count), shape), 1)
        assumed = (
            f"all {count} devices are taken to be on one switch"
            if chip.switched
            else "no coordinates: every mesh axis is taken to be a ring of neighbours"
        )
        grid = Grid(shape, tuple(n > 2 for n in shape))
        return cls(chip, grid, positions, tuple(axes), axes, assumed=assumed if count > 1 else "")

    def traffic(self, collective: Collective) -> Traffic:
        """What a collective costs."""
        return Traffic(
            self.route(collective.kind, collective.pairs, collective.groups),
            collective.shard_bytes,
        )

    def _route(
        self, kind: str, pairs: tuple[tuple[int, int], ...], groups: tuple[tuple[int, ...], ...]
    ) -> Route:
        numbers = [n for some in (*pairs, *groups) for n in some]
        if max(numbers, default=0) >= len(self.positions):
            raise ValueError(
                f"a {kind} names partition {max(numbers)}, and the mesh {self.axes} has "
                f"{len(self.positions)} devices: give the mesh that the program was compiled for"
            )
        if pairs:
            return self._permute(np.array([p for p in pairs if p[0] != p[1]], int).reshape(-1, 2))
        if len({len(group) for group in groups}) > 1:
            return self._nothing(f"{kind} over groups of different sizes")
        members = np.array(groups or [range(len(self.positions))], int)
        if members.shape[1] == 1:
            return self._nothing()
        return self._group(kind, members)

    def _permute(self, pairs: np.ndarray) -> Route:
        if not len(pairs):
            return self._nothing()
        axes, way = self._axes(pairs)
        sources, targets = pairs.T
        if self.chip.switched:
            ports = np.zeros((2, len(self.positions)))
            np.add.at(ports[0], sources, 1.0)
            np.add.at(ports[1], targets, 1.0)
            return self._switch(axes, way, float(ports.max()), 1)
        starts, ends = self.positions[sources], self.positions[targets]
        if self._crosses(starts - ends):
            return dataclasses.replace(self._nothing(SLICES), axes=axes, way=way)
        passes = self.grid.empty()
        hops = self.grid.route(passes, starts, ends)
        return self._on_grid(axes, way, passes, hops)

    def _group(self, kind: str, members: np.ndarray) -> Route:
        t = members.shape[1]
        axes, _ = self._axes(np.stack([members[:, :-1].ravel(), members[:, 1:].ravel()], 1))
        if kind in ALL_TO_ALL and not self.chip.switched:
            pairs = np.stack(np.broadcast_arrays(members[:, :, None], members[:, None, :]), -1)
            pairs = pairs.reshape(-1, 2)
            route = self._permute(pairs[pairs[:, 0] != pairs[:, 1]])
            return dataclasses.replace(route, axes=axes, way="", links=route.links / t)
        factor = _sent(kind, t)
        if factor is None:
            return dataclasses.replace(self._nothing(f"no model of {kind}"), axes=axes)
        if self.chip.switched:
            return self._switch(axes, "", factor, t - 1)
        positions = self.positions[members]
        if self._crosses(np.ptp(positions, axis=1)):
            return dataclasses.replace(self._nothing(SLICES), axes=axes)
        passes, hops = spread(self.grid, positions, factor / (t - 1), self.devices_share)
        return self._on_grid(axes, "", passes, hops * (2 if kind == "all-reduce" else 1))

    def _axes(self, pairs: np.ndarray) -> tuple[str, str]:
        """The mesh axes along which the partitions of the pairs differ, and which way round."""
        start, end = self.indices[pairs[:, 0]], self.indices[pairs[:, 1]]
        moved = np.flatnonzero((start != end).any(axis=0))
        names = list(self.axes)
        sizes = [self.axes[names[i]] for i in moved]
        place = [np.ravel_multi_index(tuple(x[:, moved].T), sizes) for x in (start, end)]
        size = math.prod(sizes)
        up = ((place[1] - place[0]) % size) * 2 <= size
        return ",".join(names[i] for i in moved), "+" if up.mean() >= 0.5 else "-"

    def _crosses(self, differences: np.ndarray) -> bool:
        """Whether positions differ in the slice, which is the first dimension of a torus."""
        return self.devices_share and bool(differences[..., 0].any())

    def _nothing(self, unknown: str = "") -> Route:
        return Route("", "", np.zeros(0), 0.0, 0, unknown=unknown)

    def _switch(self, axes: str, way: str, factor: float, steps: int) -> Route:
        latency = self.chip.permute_latency + (steps - 1) * self.chip.hop_latency
        bandwidth = self.chip.links * self.chip.link_bandwidth
        return Route(axes, way, np.array([factor / bandwidth]), latency, 1, ("port",))

    def _on_grid(self, axes: str, way: str, passes: np.ndarray, hops: int) -> Route:
        if self.devices_share:  # links between chips leave from the chip, whichever device sends
            passes[:-1] = passes[:-1].sum(axis=-1, keepdims=True)
        seconds = passes / self.chip.link_bandwidth
        if self.devices_share:
            seconds[-1] /= IN_CHIP
        latency = self.chip.permute_latency + max(0, hops - 1) * self.chip.hop_latency
        used = np.argwhere(passes.reshape(len(self.names), 2, -1).any(axis=-1))
        names = tuple(f"{self.names[dim]}{'+-'[way_]}" for dim, way_ in used)
        return Route(axes, way, seconds.ravel(), latency, hops, names)

    def _slowdowns(self, routes: tuple[Route, ...]) -> tuple[float, ...]:
        """By which factor each transfer in flight is slower than alone: the transfers on a directed
        link share its bandwidth in equal parts.

        Args:
          routes: of all transfers in flight.
        """
        active = [i for i, route in enumerate(routes) if route.seconds_per_byte]
        slow = [1.0] * len(routes)
        if len(active) > 1:
            seconds = np.stack([routes[i].links for i in active])
            shared = (seconds * (seconds > 0).sum(axis=0)).max(axis=1)
            for i, busiest in zip(active, shared, strict=True):
                slow[i] = float(busiest) / routes[i].seconds_per_byte
        return tuple(slow)


def _sent(kind: str, t: int) -> float | None:
    """Bytes that every device of a group of `t` passes on, for one byte of its shard."""
    factors = {
        "all-gather": t - 1.0,
        "reduce-scatter": (t - 1) / t,
        "all-reduce": 2 * (t - 1) / t,
        "collective-broadcast": 1.0,
    }
    return factors.get(kind, (t - 1) / t if kind in ALL_TO_ALL else None)

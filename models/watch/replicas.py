"""Finds a parameter whose copies differ: a bit of memory flipped, or a device computes wrong.

Where parameters are not cut, every device along the data axes holds a copy, and makes the same
update to it. Nothing in training ever compares them, and a wrong copy spreads through the
gradients of its rows. Here each device makes a fingerprint of what lies in its own memory
(`fingerprint.mark`, which any single changed element changes), all processes get the table of
devices x parameters, and each compares the rows of the devices that should hold the same.

Cost: one reading of the parameters from memory, and a gathering of 4 bytes for each parameter and
device.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.watch import status
from models.watch.fingerprint import mark


@dataclasses.dataclass(frozen=True)
class Odd:
    """A copy that differs from the others.

    Args:
      parameter: its name, `encoder.norm.scale`.
      device: as jax prints it.
      process: that the device belongs to.
      place: the device's coordinates in the mesh, {axis: index}.
      copies: how many devices hold this parameter, or this part of it.
      sure: whether most of the copies agree; of two that differ either may be wrong.
    """

    parameter: str
    device: str
    process: int
    place: dict[str, int]
    copies: int
    sure: bool

    def __str__(self) -> str:
        place = ", ".join(f"{axis} {index}" for axis, index in self.place.items())
        doubt = "" if self.sure else " (or the other copy: with two, none is in the majority)"
        return (
            f"{self.parameter} on {self.device} of process {self.process} ({place}) differs from "
            f"the rest of {self.copies} copies{doubt}"
        )


class Replicas:
    """Compares the copies of a tree's arrays.

    Args:
      like: a tree of arrays, or of descriptions, with the shardings that the arrays have. Those
        without a mesh have no copies.
    """

    def __init__(self, like: Any) -> None:
        leaves = jax.tree_util.tree_flatten_with_path(like)[0]
        self._names = [".".join(_key(key) for key in path) for path, _ in leaves]
        described = [leaf for _, leaf in leaves]
        self._groups = [_groups(leaf) for leaf in described]
        self._run: Any = None
        self._mesh: Mesh | None = None
        meshes = {
            x.sharding.mesh
            for x in described
            if isinstance(x.sharding, NamedSharding) and isinstance(x.sharding.mesh, Mesh)
        }
        if len(meshes) > 1:
            raise ValueError(f"the arrays lie on {len(meshes)} meshes; compare those of one mesh")
        if meshes and any(self._groups):
            (self._mesh,) = meshes
            self._run = _table(self._mesh, [x.sharding.spec for x in described])

    def start(self, tree: Any) -> jax.Array | None:
        """Lets every device make its fingerprints, and does not wait for them.

        Args:
          tree: arrays, as `like` said.

        Returns:
          [devices, arrays] uint32, the same in all processes, or None where there are no copies.
        """
        if self._run is None:
            return None
        table: jax.Array = self._run(jax.tree.leaves(tree))
        return table

    def odd(self, table: jax.Array | None) -> list[Odd]:
        """The copies that differ from the others, in the table that `start` gave."""
        if table is None or self._mesh is None:
            return []
        marks = np.asarray(table)
        found = []
        devices = list(self._mesh.devices.flat)
        for column, (name, groups) in enumerate(zip(self._names, self._groups, strict=True)):
            for group in groups:
                (usual, votes), *_ = collections.Counter(
                    marks[row, column] for row in group
                ).most_common(1)
                for row in group:
                    if marks[row, column] != usual:
                        place = np.unravel_index(row, self._mesh.devices.shape)
                        where = {
                            axis: int(index)
                            for axis, index in zip(self._mesh.axis_names, place, strict=True)
                        }
                        device = devices[row]
                        sure = 2 * votes > len(group)
                        found.append(
                            Odd(name, str(device), device.process_index, where, len(group), sure)
                        )
        return found

    def check(self, tree: Any) -> None:
        """Compares now.

        Raises:
          Fault: if copies differ: names the first parameters and devices, in all processes.
        """
        raise_if(self.odd(self.start(tree)))


def raise_if(odd: list[Odd], shown: int = 5) -> None:
    """Raises a `Fault` that names the copies, if there are any."""
    if odd:
        more = f", and {len(odd) - shown} more" if len(odd) > shown else ""
        raise status.Fault(
            "; ".join(str(one) for one in odd[:shown]) + more + ". Memory or a device is damaged: "
            "go on from the last checkpoint, without the device if it happens again",
            status.CORRUPTED,
        )


def _groups(x: Any) -> list[list[int]]:
    """Rows of devices, numbered as in the mesh, that hold the same part of an array."""
    if not isinstance(x.sharding, NamedSharding):
        return []
    number = {device: row for row, device in enumerate(x.sharding.mesh.devices.flat)}
    same = collections.defaultdict(list)
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        same[str(index)].append(number[device])
    return [sorted(rows) for rows in same.values() if len(rows) > 1]


def _table(mesh: Mesh, specs: list[P]) -> Any:
    """A function of the arrays that gives every device's fingerprints: [devices, arrays] uint32."""

    def own(leaves: list[jax.Array]) -> jax.Array:
        return jnp.stack([mark(leaf) for leaf in leaves])[None]

    everywhere = P(mesh.axis_names)
    # What is not cut counts as the same on all devices: exactly what is in doubt here.
    mapped = jax.shard_map(own, mesh=mesh, in_specs=(specs,), out_specs=everywhere, check_vma=False)
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, P()))


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)

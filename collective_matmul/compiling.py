"""Which machine a program is for, and what its compiler is to be told."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

_TPU = {"xla_max_concurrent_async_collective_permutes": "16"}
"""By default five are in flight at once. In the backward pass of `dense.layers` eight journeys are
under way, and the products' own hops beside them: see `docs/performance.md` for what it costs."""


def on_tpu(mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether the devices are TPUs, there or only compiled for.

    Args:
      mesh: of the devices, or None for jax's default one.
    """
    if mesh is None:
        return jax.default_backend() == "tpu"
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device
    return device is not None and device.device_kind.startswith("TPU")


def compiler_options(mesh: Mesh | AbstractMesh | None) -> dict[str, Any]:
    """Options for `jax.jit(..., compiler_options=...)` of programs that hide hops by the dozen.

    Args:
      mesh: of the devices that the program is for, or None for jax's default one.

    Returns:
      By name; none for machines whose compiler needs none.
    """
    return dict(_TPU) if on_tpu(mesh) else {}

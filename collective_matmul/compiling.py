"""Which machine a program is for, and what its compiler is to be told."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from collective_matmul import hardware

_TPU = {"xla_max_concurrent_async_collective_permutes": "16"}
"""By default five are in flight at once. In the backward pass of `dense.layers` eight journeys are
under way, and the products' own hops beside them: see `docs/performance.md` for what it costs."""

_WINDOWS, _LATENCY = "xla_tpu_scoped_vmem_limit_kib", "xla_lhs_output_fusion_latency_multiplier"
_BY_CHIP = {
    "v5p": {_WINDOWS: str(48 * 1024)},
    "v6e": {_WINDOWS: str(96 * 1024), _LATENCY: "0.25"},
    "7x": {_WINDOWS: str(64 * 1024), _LATENCY: "0.25"},
}
"""What ViT-22B's step gains by, predicted; on v4 neither does any good.

More on-chip memory for the windows of one operation, by default 16, 32 and 32 MiB: on v5p 1,467 ms
where it took 1,570, on v6e 1,221 of 1,304, on 7x 879 of 927. Small products lose by it: what is
left keeps no operand from one chunk to the next.

The scheduler takes hops to be several times as fast as one link is, and starts them too late where
links are slow beside products. Told that products take a quarter of what it thinks, it starts them
earlier: on v6e 1,177 ms of 1,221, on 7x 863 of 879.
"""


def current_chip() -> hardware.Chip:
    """The chip that is traced for: that of the mesh in use, else the default backend's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    return hardware.from_device_kind(kind)


def on_tpu(mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether the devices are TPUs, there or only compiled for.

    Args:
      mesh: of the devices, or None for jax's default one.
    """
    return _kind(mesh).startswith("TPU")


def compiler_options(mesh: Mesh | AbstractMesh | None) -> dict[str, Any]:
    """Options for `jax.jit(..., compiler_options=...)` of a large model's training step.

    Args:
      mesh: of the devices that the program is for, or None for jax's default one.

    Returns:
      By name; none for machines whose compiler needs none.
    """
    kind = _kind(mesh)
    if not kind.startswith("TPU"):
        return {}
    return _TPU | _BY_CHIP.get(hardware.from_device_kind(kind).name, {})


def _kind(mesh: Mesh | AbstractMesh | None) -> str:
    """`device_kind` of the devices; "" where an abstract mesh tells none."""
    if mesh is None:
        return jax.devices()[0].device_kind
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device
    return device.device_kind if device is not None else ""

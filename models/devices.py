"""The devices of a run: accelerators where there are enough, else simulated ones on the CPU."""

from __future__ import annotations

import os
from typing import Any, Literal, Protocol

import jax

from collective_matmul import Layout, make_mesh

Cut = Literal["tokens", "rows", "features"]
"""What the tensor axis cuts between layers: the tokens of each image; rows of the batch, by which
the tokens of an image lie together; or features."""


class Meshed(Protocol):
    """What says where arrays lie, such as the config of a run."""

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Devices on the axes data, fsdp and tensor."""

    @property
    def devices(self) -> int:
        """How many these are."""

    @property
    def layout(self) -> Cut:
        """What the tensor axis cuts between layers."""

    @property
    def algorithm(self) -> str | None:
        """How the collective matmuls travel."""

    @property
    def backend(self) -> str | None:
        """What runs them."""


def simulate(count: int) -> None:
    """Lets the CPU pass for `count` devices; to be called before jax is asked for devices.

    Where there are accelerators, jax prefers them, and this changes nothing.

    Args:
      count: how many devices. A number that the user set (JAX_NUM_CPU_DEVICES, XLA_FLAGS) stays.
    """
    chosen = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen < 1 and not forced:
        jax.config.update("jax_num_cpu_devices", count)
    # XLA:CPU has one thread for each device. Collectives that do not depend on one another may then
    # be taken in another order on every device, and wait for one another for ever (jaxlib 0.10.2).
    # More threads, and a schedule in the order of the program, keep them apart.
    os.environ.setdefault("NPROC", str(8 * count))
    flags, flag = os.environ.get("XLA_FLAGS", ""), "xla_cpu_enable_concurrency_optimized_scheduler"
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{flag}=false".strip()


def layout_of(config: Meshed) -> Layout | None:
    """Where the arrays of a run lie, or None for one device without a mesh.

    Args:
      config: mesh, layout, algorithm and backend.

    Raises:
      ValueError: if the mesh needs more devices than there are, or leaves a process without one.
    """
    devices = jax.devices()
    if config.devices == 1:
        return None
    spare = len(devices) - config.devices
    if spare < 0 or (spare and jax.process_count() > 1):
        data, fsdp, tensor = config.mesh
        remedy = f"choose a mesh of {len(devices)} devices, for example --mesh 1,1,{len(devices)}"
        if jax.process_count() == 1:
            remedy += (
                f", or simulate {config.devices} on the CPU: JAX_PLATFORMS=cpu "
                f"JAX_NUM_CPU_DEVICES={config.devices}"
            )
        raise ValueError(
            f"the mesh has {data} x {fsdp} x {tensor} = {config.devices} devices (data x fsdp x "
            f"tensor), and there are {len(devices)} of {devices[0].device_kind}; {remedy}"
        )
    return Layout(
        make_mesh(*config.mesh, devices=devices[: config.devices]),
        **cut(config.layout),
        algorithm=config.algorithm,
        backend=config.backend,
    )


def cut(what: Cut) -> dict[str, Any]:
    """The word in a `Layout`'s."""
    if what == "features":
        return {"activations": "features"}
    return {"activations": "tokens", "token_dim": 0 if what == "rows" else 1}

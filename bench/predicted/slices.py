"""Slices of TPUs that are not there: devices to compile for, on any Linux machine with libtpu.

The TPU compiler needs no TPU. `tpu_slice("v4:8x8x16")` gives its devices, with their coordinates on
the torus; programs are compiled for them as for real ones, and cannot be run.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterable
from typing import Any

import jax
from jax.experimental import topologies

from bench.commands import UserError
from collective_matmul import hardware

# How libtpu calls the generations, and what its devices are where that is not its default: one a
# chip, of two cores.
_PLATFORMS = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "7x": "tpu7x"}
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
_EXAMPLES = "v4:8x8x16, v5e:16x16, v5p:4x4x4, v6e:2x4 or 7x:2x2x1"

# The smallest slice of each chip with a ring of 4, which compiles quickest.
SMALLEST = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "7x": "7x:2x2x1",
}
LARGEST = 9216  # chips of a 7x: https://docs.cloud.google.com/tpu/docs/tpu7x

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # else libtpu asks a cloud's metadata server, for minutes
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process waits for the first one's lock file
    "TPU_WORKER_HOSTNAMES": "localhost",  # these two: else it warns that it does not find them
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}


def compile_only() -> None:
    """Keeps jax and libtpu from looking for devices; to be called before jax is asked for any."""
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")


def tpu_slice(name: str) -> tuple[Any, ...]:
    """The devices of a slice, which can be compiled for.

    Args:
      name: `"CHIP:XxY"` or `"CHIP:XxYxZ"`: a TPU of `collective_matmul.hardware` and how many chips
        its torus has each way.

    Raises:
      UserError: if there is no such slice, or the compiler is not installed; says what to do.
    """
    asked = re.fullmatch(r"(?:tpu[ -]?)?(\w+):([1-9]\d*(?:x[1-9]\d*){1,2})", name.strip().lower())
    if asked is None or asked[1] not in _PLATFORMS:
        raise UserError(
            f"no topology {name!r}: write CHIP:XxY or CHIP:XxYxZ with one of the chips "
            f"{', '.join(_PLATFORMS)}, for example {_EXAMPLES}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is not installed: pip install 'collective-matmul[aot]' (Linux on "
            "x86-64; libtpu comes under Google Cloud's terms of service)"
        )
    chip, size = asked[1], asked[2]
    chips = math.prod(map(int, size.split("x")))
    if chips > LARGEST:
        raise UserError(f"{name!r} has {chips:,} chips; no slice has more than {LARGEST:,}")
    try:
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{_PLATFORMS[chip]}:{size}",
            **_OPTIONS.get(chip, {}),
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the TPU compiler knows no topology {name!r}: {reason}. Slices that exist are for "
            f"example {_EXAMPLES}"
        ) from error
    return tuple(topology.devices)


def chip_of(devices: Iterable[Any]) -> hardware.Chip:
    """The chip that devices are, as `collective_matmul.hardware` knows it."""
    return hardware.from_device_kind(next(iter(devices)).device_kind)

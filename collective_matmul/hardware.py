"""Chips as data: peaks, memory, links and clocks, each number with its unit and its source.

One row of the table below describes one jax *device*, because a device is what a program sees. A
TPU v4 or v5p in its usual megacore mode, a v5e, a v6e and a GPU are one device a chip; a TPU7x
chip is two devices. Only the links belong to the whole chip: the devices of a chip share them.

The time of one `lax.ppermute` of `n` bytes over `h` hops is modelled as

    permute_latency + (h - 1) * hop_latency + n / link_bandwidth

Numbers that nobody has published are marked `assumed` on their line. They may choose a schedule;
nothing is ever divided by them: `peak` gives None for a chip that is made of assumptions.
"""

from __future__ import annotations

import dataclasses
import difflib

import jax.numpy as jnp
from jax.typing import DTypeLike

TERA, GB, GIB, MIB, US, GHZ = 1e12, 1e9, 2.0**30, 2.0**20, 1e-6, 1e9

# Bandwidth between the devices of a chip, in links: https://docs.cloud.google.com/tpu/docs/tpu7x
IN_CHIP = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One jax device of a kind: rates in operations, bytes and cycles per second; times in seconds.

    `f32` is the rate of a float32 matmul at jax's default precision, which is one bfloat16 pass on
    TPU and TF32 on Hopper: https://docs.jax.dev/en/latest/201/precision.html
    """

    name: str
    device_kinds: tuple[str, ...]  # what jax reports as `device.device_kind`
    devices_per_chip: int
    bf16: float | None  # FLOP/s, dense
    int8: float | None  # op/s, dense; None: not supported, or not published
    fp8: float | None  # FLOP/s, dense
    f32: float | None  # FLOP/s, dense, default precision
    hbm_bytes: float  # bytes
    hbm_bandwidth: float  # bytes/s
    cores: int = 1  # that compute, each with on-chip memory of its own
    unit: int = 128  # columns of a matrix unit
    vmem: float = 0.0  # bytes on chip of one core that a kernel can lay out; 0: no TPU
    kept: float = 0.0  # bytes of an operand that can stay on the chip from product to product
    links: int  # links of the whole chip; with `switched` the one port into the switch
    link_bandwidth: float  # bytes/s of one link in one direction
    switched: bool = False  # True: every peer is one hop away, all transfers share the port
    hop_latency: float  # s added by each further hop
    permute_latency: float  # s that one permute to a neighbour costs before its first byte
    clock: float | None  # Hz; for TPU the clock at which the peak above is reached
    assumed: bool = False  # True: the row is an assumption, an MFU must not be computed from it


# Clocks: peak over the FLOPs that the matmul units finish in a cycle (131,072 on v5e, 262,144 on v4
# and v5p, 524,288 on v6e and on one 7x device), which turns the cycles that the TPU compiler
# estimates into seconds of the silicon. The compiler's own cost analysis assumes 12 to 14% less on
# v4 (0.92 GHz), v5p (1.50 GHz) and 7x (1.90 GHz).
# A link's bytes/s are 10% below the vendor's figure for the chip over links and directions; large
# permutes were measured within 4% of it.

_TABLE = (
    Chip(
        name="v4",
        device_kinds=("TPU v4",),  # https://github.com/jax-ml/jax/blob/main/jax/_src/tpu_info.py
        devices_per_chip=1,  # megacore: https://docs.cloud.google.com/tpu/docs/v4
        bf16=275 * TERA,  # FLOP/s https://docs.cloud.google.com/tpu/docs/v4
        int8=275 * TERA,  # op/s https://docs.cloud.google.com/tpu/docs/v4
        fp8=None,
        f32=275 * TERA,  # FLOP/s https://docs.jax.dev/en/latest/201/precision.html
        hbm_bytes=32 * GIB,  # bytes https://docs.cloud.google.com/tpu/docs/v4
        hbm_bandwidth=1200 * GB,  # bytes/s https://docs.cloud.google.com/tpu/docs/v4
        cores=2,  # megacore: https://docs.cloud.google.com/tpu/docs/v4
        vmem=16 * MIB,  # bytes https://github.com/jax-ml/jax/blob/main/jax/_src/tpu_info.py
        kept=24 * MIB,  # bytes assumed: VMEM of two cores, 8 MiB less
        links=6,  # 3-D torus: https://docs.cloud.google.com/tpu/docs/v4
        link_bandwidth=45 * GB,  # bytes/s https://jax-ml.github.io/scaling-book/tpus/
        hop_latency=1 * US,  # s https://jax-ml.github.io/scaling-book/sharding/
        permute_latency=4.55 * US,  # s assumed: as measured on v5p
        clock=1.05 * GHZ,  # Hz = 275e12 / 262144, https://arxiv.org/abs/2304.01433
    ),
    Chip(
        name="v5e",
        device_kinds=("TPU v5 lite", "TPU v5e"),  # jax/_src/tpu_info.py as above
        devices_per_chip=1,  # https://docs.cloud.google.com/tpu/docs/v5e
        bf16=197 * TERA,  # FLOP/s https://docs.cloud.google.com/tpu/docs/v5e
        int8=393 * TERA,  # op/s https://docs.cloud.google.com/tpu/docs/v5e
        fp8=None,
        f32=197 * TERA,  # FLOP/s https://docs.jax.dev/en/latest/201/precision.html
        hbm_bytes=16 * GIB,  # bytes https://docs.cloud.google.com/tpu/docs/v5e
        hbm_bandwidth=819 * GB,  # bytes/s https://docs.cloud.google.com/tpu/docs/v5e
        vmem=128 * MIB,  # bytes https://github.com/jax-ml/jax/blob/main/jax/_src/tpu_info.py
        kept=96 * MIB,  # bytes assumed: VMEM of a core, 32 MiB less
        links=4,  # ports, 2-D torus: https://docs.cloud.google.com/tpu/docs/v5e
        link_bandwidth=45 * GB,  # bytes/s https://jax-ml.github.io/scaling-book/tpus/
        hop_latency=1 * US,  # s https://jax-ml.github.io/scaling-book/sharding/
        permute_latency=4.55 * US,  # s assumed: as measured on v5p
        clock=1.50 * GHZ,  # Hz https://jax-ml.github.io/scaling-book/tpus/
    ),
    Chip(
        name="v5p",
        device_kinds=("TPU v5", "TPU v5p"),  # jax/_src/tpu_info.py as above
        devices_per_chip=1,  # megacore: https://docs.cloud.google.com/tpu/docs/v5p
        bf16=459 * TERA,  # FLOP/s https://docs.cloud.google.com/tpu/docs/v5p
        int8=918 * TERA,  # op/s https://jax-ml.github.io/scaling-book/tpus/
        fp8=459 * TERA,  # FLOP/s https://docs.cloud.google.com/tpu/docs/v5p
        f32=459 * TERA,  # FLOP/s https://docs.jax.dev/en/latest/201/precision.html
        hbm_bytes=95 * GIB,  # bytes, usable of 96: https://docs.cloud.google.com/tpu/docs/v5p
        hbm_bandwidth=2765 * GB,  # bytes/s https://docs.cloud.google.com/tpu/docs/v5p
        cores=2,  # megacore: https://docs.cloud.google.com/tpu/docs/v4
        vmem=64 * MIB,  # bytes https://github.com/jax-ml/jax/blob/main/jax/_src/tpu_info.py
        kept=32 * MIB,  # bytes assumed: VMEM of a core, 32 MiB less
        links=6,  # 3-D torus: https://docs.cloud.google.com/tpu/docs/v5p
        link_bandwidth=90 * GB,  # bytes/s https://jax-ml.github.io/scaling-book/tpus/
        hop_latency=1 * US,  # s https://jax-ml.github.io/scaling-book/sharding/
        # s, measured with 86.3 GB/s: https://github.com/marin-community/marin/issues/6736
        permute_latency=4.55 * US,
        clock=1.75 * GHZ,  # Hz = 459e12 / 262144, https://docs.cloud.google.com/tpu/docs/v5p
    ),
    Chip(
        name="v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),  # jax/_src/tpu_info.py as above
        devices_per_chip=1,  # https://docs.cloud.google.com/tpu/docs/v6e
        bf16=918 * TERA,  # FLOP/s https://docs.cloud.google.com/tpu/docs/v6e
        int8=1836 * TERA,  # op/s https://docs.cloud.google.com/tpu/docs/v6e
        fp8=918 * TERA,  # FLOP/s https://docs.cloud.google.com/tpu/docs/tpu7x
        f32=918 * TERA,  # FLOP/s https://docs.jax.dev/en/latest/201/precision.html
        hbm_bytes=32 * GIB,  # bytes https://docs.cloud.google.com/tpu/docs/v6e
        hbm_bandwidth=1638 * GB,  # bytes/s https://docs.cloud.google.com/tpu/docs/v6e
        unit=256,  # columns https://github.com/jax-ml/jax/blob/main/jax/_src/tpu_info.py
        vmem=128 * MIB,  # bytes https://github.com/jax-ml/jax/blob/main/jax/_src/tpu_info.py
        kept=96 * MIB,  # bytes assumed: VMEM of a core, 32 MiB less
        links=4,  # ports, 2-D torus: https://docs.cloud.google.com/tpu/docs/v6e
        link_bandwidth=90 * GB,  # bytes/s https://jax-ml.github.io/scaling-book/tpus/
        hop_latency=1 * US,  # s https://jax-ml.github.io/scaling-book/sharding/
        # s, measured with 86.8 GB/s: https://github.com/marin-community/marin/issues/6736
        permute_latency=2.29 * US,
        clock=1.75 * GHZ,  # Hz = 918e12 / 524288, https://docs.cloud.google.com/tpu/docs/v6e
    ),
    Chip(
        name="7x",
        device_kinds=("TPU7x",),  # jax/_src/tpu_info.py as above
        devices_per_chip=2,  # two TensorCores: https://docs.cloud.google.com/tpu/docs/tpu7x
        bf16=2307 / 2 * TERA,  # FLOP/s, half a chip: https://docs.cloud.google.com/tpu/docs/tpu7x
        int8=None,
        fp8=4614 / 2 * TERA,  # FLOP/s, half a chip: https://docs.cloud.google.com/tpu/docs/tpu7x
        f32=2307 / 2 * TERA,  # FLOP/s https://docs.jax.dev/en/latest/201/precision.html
        hbm_bytes=192 / 2 * GIB,  # bytes, half: https://docs.cloud.google.com/tpu/docs/tpu7x
        hbm_bandwidth=7380 / 2 * GB,  # bytes/s https://docs.cloud.google.com/tpu/docs/tpu7x
        unit=256,  # columns https://github.com/jax-ml/jax/blob/main/jax/_src/tpu_info.py
        vmem=64 * MIB,  # bytes https://github.com/jax-ml/jax/blob/main/jax/_src/tpu_info.py
        kept=32 * MIB,  # bytes assumed: VMEM of a core, 32 MiB less
        links=6,  # of the chip, shared by 2: https://docs.cloud.google.com/tpu/docs/tpu7x
        link_bandwidth=90 * GB,  # bytes/s https://jax-ml.github.io/scaling-book/tpus/
        hop_latency=1 * US,  # s https://jax-ml.github.io/scaling-book/sharding/
        permute_latency=4.55 * US,  # s assumed: as measured on v5p
        clock=2.20 * GHZ,  # Hz = 1153.5e12 / 524288, https://docs.cloud.google.com/tpu/docs/tpu7x
    ),
    Chip(
        name="H100",  # SXM5
        device_kinds=("NVIDIA H100 80GB HBM3",),  # https://www.nvidia.com/en-us/data-center/h100/
        devices_per_chip=1,  # https://www.nvidia.com/en-us/data-center/h100/
        # Dense rates are half of those with sparsity that the vendor prints.
        bf16=989 * TERA,  # FLOP/s https://www.nvidia.com/en-us/data-center/h100/
        int8=1979 * TERA,  # op/s https://www.nvidia.com/en-us/data-center/h100/
        fp8=1979 * TERA,  # FLOP/s https://www.nvidia.com/en-us/data-center/h100/
        f32=494 * TERA,  # FLOP/s, TF32: https://www.nvidia.com/en-us/data-center/h100/
        hbm_bytes=80 * GB,  # bytes https://www.nvidia.com/en-us/data-center/h100/
        hbm_bandwidth=3350 * GB,  # bytes/s https://www.nvidia.com/en-us/data-center/h100/
        links=1,  # 18 NVLinks, one port: https://www.nvidia.com/en-us/data-center/nvlink/
        link_bandwidth=450 * GB,  # bytes/s https://www.nvidia.com/en-us/data-center/nvlink/
        switched=True,  # NVSwitch, up to 8 GPUs: https://www.nvidia.com/en-us/data-center/nvlink/
        hop_latency=3.4 * US,  # s, NCCL's own model: https://github.com/NVIDIA/nccl/issues/1334
        permute_latency=11.8 * US,  # s, 8.4 + 3.4: https://github.com/NVIDIA/nccl/issues/1334
        # Hz, the peak over 528 tensor cores of 1,024 FLOPs a cycle:
        clock=1.83 * GHZ,  # https://developer.nvidia.com/blog/nvidia-hopper-architecture-in-depth/
    ),
)

_H200 = dataclasses.replace(  # the silicon of H100 with other memory
    _TABLE[-1],
    name="H200",
    device_kinds=("NVIDIA H200",),  # https://www.nvidia.com/en-us/data-center/h200/
    hbm_bytes=141 * GB,  # bytes https://www.nvidia.com/en-us/data-center/h200/
    hbm_bandwidth=4800 * GB,  # bytes/s https://www.nvidia.com/en-us/data-center/h200/
)

# Where nothing is known: the compute and the links of a v5e, and a step that costs twice as much,
# so that only products with clearly enough to hide are decomposed.
_ASSUMED_RATE = 200 * TERA  # FLOP/s assumed
UNKNOWN = Chip(
    name="unknown",
    device_kinds=(),
    devices_per_chip=1,  # assumed
    bf16=_ASSUMED_RATE,
    int8=None,
    fp8=None,
    f32=None,
    hbm_bytes=16 * GIB,  # bytes assumed
    hbm_bandwidth=800 * GB,  # bytes/s assumed
    links=2,  # assumed: one ring, both directions
    link_bandwidth=45 * GB,  # bytes/s assumed
    hop_latency=1 * US,  # s assumed
    permute_latency=10 * US,  # s assumed
    clock=None,
    assumed=True,
)

# A simulated device: links as unknown, and no peak, so an MFU is not defined.
_CPU = dataclasses.replace(UNKNOWN, name="cpu", device_kinds=("cpu",), bf16=None)

_BY_NAME = {row.name: row for row in (*_TABLE, _H200, _CPU, UNKNOWN)}
_BY_KIND = {kind: row for row in _BY_NAME.values() for kind in row.device_kinds}


def names() -> tuple[str, ...]:
    """The names of the chips in the table."""
    return tuple(_BY_NAME)


def chip(name: str) -> Chip:
    """The chip of this name or jax `device_kind`, in any case of letters: "v5e" or "TPU v5 lite".

    Raises:
      ValueError: if there is none (with the nearest names).
    """
    rows = {key.casefold(): row for key, row in (_BY_NAME | _BY_KIND).items()}
    if name.casefold() in rows:
        return rows[name.casefold()]
    near = [rows[key].name for key in difflib.get_close_matches(name.casefold(), rows, n=2)]
    hint = f" Did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else ""
    raise ValueError(f"unknown chip {name!r}; there are {', '.join(names())}.{hint}")


def from_device_kind(kind: str) -> Chip:
    """The chip that jax calls `kind` (`device.device_kind`), or `UNKNOWN`; it never raises.

    TPU v4 and v5p report one kind in both of their modes; megacore, the usual one, is meant.
    """
    return _BY_KIND.get(kind, UNKNOWN)


def peak(chip: Chip, dtype: DTypeLike) -> float | None:
    """Published dense matmul rate (FLOP/s) of one device for operands of `dtype`: an MFU's divisor.

    float16 counts as bfloat16, any float8 as fp8, float32 as jax multiplies it by default.

    Returns:
      The rate, or None: not supported, not published, or the chip is unknown. Then say "no MFU".
    """
    return None if chip.assumed else _rate(chip, dtype)


def planning_rate(chip: Chip, dtype: DTypeLike) -> float:
    """A rate (FLOP/s) to choose a schedule by, never None: `peak`, or the nearest assumption.

    Where the dtype has no peak, the chip's bfloat16 rate stands in, and then that of `UNKNOWN`.
    """
    return _rate(chip, dtype) or chip.bf16 or _ASSUMED_RATE


_FIELDS = {"bfloat16": "bf16", "float16": "bf16", "float32": "f32", "int8": "int8", "uint8": "int8"}


def _rate(chip: Chip, dtype: DTypeLike) -> float | None:
    name = jnp.dtype(dtype).name
    field = "fp8" if name.startswith("float8") else _FIELDS.get(name)
    return getattr(chip, field) if field else None

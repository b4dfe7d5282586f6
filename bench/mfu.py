"""Model FLOPs utilisation: `MFU = model FLOPs / (seconds * devices * peak)`.

With hardware FLOPs for model FLOPs it is the hardware FLOPs utilisation, HFU. The peak is the
datasheet's dense rate of one jax device for the dtype, from `collective_matmul.hardware`. Where
nobody published one there is no MFU, and a sentence says so.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from bench.work import Work
from collective_matmul import hardware
from collective_matmul.hardware import Chip


@dataclasses.dataclass(frozen=True)
class Utilisation:
    """A share of the peak, with everything that it was computed from.

    Args:
      work: the FLOPs and their convention.
      seconds: what the work took.
      devices: jax devices that did it.
      chip: what they are.
      dtype: of the operands; its peak is the divisor.
    """

    work: Work
    seconds: float
    devices: int
    chip: Chip
    dtype: DTypeLike

    def __post_init__(self) -> None:
        if not self.seconds > 0 or self.devices < 1:
            raise ValueError(
                f"seconds={self.seconds} and devices={self.devices} must be more than 0"
            )

    @property
    def peak(self) -> float | None:
        """FLOP/s of one device, or None."""
        return hardware.peak(self.chip, self.dtype)

    @property
    def value(self) -> float | None:
        """The share, 1.0 at the peak; None where the chip has no published peak."""
        if self.peak is None:
            return None
        return self.work.flops / (self.seconds * self.devices * self.peak)

    def __str__(self) -> str:
        name = {"model": "MFU", "hardware": "HFU"}[self.work.kind]
        dtype = jnp.dtype(self.dtype).name
        if self.value is None or self.peak is None:
            return f"no {name}: no peak is published for {dtype} on the chip {self.chip.name!r}"
        devices = f"{self.devices} device{'s' * (self.devices > 1)}"
        impossible = (
            " IMPOSSIBLE: more than the peak. Check seconds, devices, dtype and FLOPs."
            if self.value > 1
            else ""
        )
        return (
            f"{name} {self.value:.2%} of {self.peak / 1e12:g} TFLOP/s ({self.chip.name}, {dtype}, "
            f"{devices}), {self.work}{impossible}"
        )


def utilisation(
    work: Work, seconds: float, *, devices: int, chip: Chip, dtype: DTypeLike = jnp.bfloat16
) -> Utilisation:
    """The share of the peak that `work` in `seconds` on `devices` is.

    Args:
      work: from `bench.work`; of one token for the reciprocal of tokens/s, of a step for its time.
      seconds: what it took, on all devices together.
      devices: jax devices: a v4 or v5p chip in megacore mode is one, a 7x chip is two.
      chip: `hardware.chip("v4")`, or `hardware.from_device_kind(device.device_kind)`.
      dtype: of the operands.

    Raises:
      ValueError: if seconds or devices are not more than 0.
    """
    return Utilisation(work, seconds, devices, chip, dtype)

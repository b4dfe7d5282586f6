"""What a kernel runs on: a TPU's cores and their memory, or the interpreter of another machine."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.experimental.pallas import tpu as pltpu

from collective_matmul.compiling import current_chip
from collective_matmul.hardware import Chip

INTERPRETED = 16 * 2.0**20  # bytes on chip where nothing is on a chip: as small as any TPU's
LIMIT, PLANNED = 0.97, 0.86
"""Of the on-chip memory, what a kernel may ask the compiler for, and what its arrays may take: the
compiler needs the rest for what it cannot keep in registers."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """One device.

    Args:
      cores: that share its memory.
      vmem: bytes on chip that a kernel's arrays may take on each of them.
      spare: bytes that are left for the compiler.
      unit: columns of a matrix unit.
      interpret: as in `pallas_call`; False on a TPU.
    """

    cores: int
    vmem: int
    spare: int
    unit: int
    interpret: Any

    @classmethod
    def current(cls) -> Machine:
        """That of the device traced for."""
        return cls.of(current_chip())

    @classmethod
    def of(cls, chip: Chip) -> Machine:
        """A device of this chip; if it is no TPU, an interpreted one."""
        if chip.vmem:
            planned = int(PLANNED * chip.vmem)
            return cls(chip.cores, planned, int(chip.vmem) - planned, chip.unit, False)
        return cls(1, int(INTERPRETED), 0, 1, pltpu.InterpretParams(num_cores_or_threads=1))

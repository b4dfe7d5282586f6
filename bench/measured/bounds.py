"""The least time that a collective product can take on a chip: its products, or its bytes.

    bound = max(FLOPs / peak, bytes in / (links of the ring * link bandwidth))

`FLOPs` are one device's; `bytes in` is what has to reach it, `t - 1` shards for a gather and as
many partial sums for a scatter. A ring of more than two devices brings them through two links at
once, a switch through its port. A backward pass adds the travel of its first dual alone: the
second gather of an operand that was not kept is a choice, so no bound may count it.
"""

from __future__ import annotations

import dataclasses

from collective_matmul import hardware
from collective_matmul.explain import Explanation
from collective_matmul.hardware import Chip


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds of the products at the chip's peak, and of the bytes at its links' bandwidth."""

    compute: float
    link: float

    @property
    def seconds(self) -> float:
        """The longer of the two: with everything overlapped, no less."""
        return max(self.compute, self.link)


def bound(told: Explanation, flops: float, *, backward: bool, chip: Chip) -> Bound | None:
    """The bound of an operation, with its gradient or without.

    Args:
      told: what `collective_matmul.explain` says about the call.
      flops: of the products of one device, backward ones included where they run.
      backward: whether the gradient runs too.
      chip: one device's row.

    Returns:
      The bound, or None where the chip's numbers are assumptions, or the dtype has no peak.
    """
    op = told.op
    peak = hardware.peak(chip, op.terms[0].lhs.dtype)
    if peak is None:
        return None
    travelling = op.travelling.nbytes
    if backward:
        travelling += told.backward[0].op.travelling.nbytes
    links = chip.links if chip.switched else min(2, op.t - 1)
    link = (op.t - 1) * travelling / (links * chip.link_bandwidth) if op.t > 1 else 0.0
    return Bound(flops / peak, link)

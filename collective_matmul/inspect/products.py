"""FLOPs of a contraction and of a convolution, from their shapes.

A multiplication and the addition of its result are 2 FLOPs; of complex numbers they are 8.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from collective_matmul.inspect.hlo import Array


def contraction(out: Array, lhs: Array, contracted: Iterable[int]) -> int:
    """`2 * |out| * (sizes of the contracted dimensions of lhs)`: 2 m n k of every batch."""
    return flops_of_one(out) * out.size * math.prod(lhs.shape[d] for d in contracted)


def convolution(window: str, labels: str, lhs: Array, rhs: Array, out: Array) -> int:
    """`2 * |batch| * |features out| * |features in| / groups * (pairs of place and tap)`.

    A tap that falls on padding, or on a zero between dilated places, is no pair. So a window that
    slides over padding, until one tap after the other has met the one element, counts once.

    Args:
      window: for example `{size=1x12 pad=0_0x11_11 rhs_reversal=0x1}`; `{}` without spatial
        dimensions.
      labels: for example `0bf1_i1o0->0b1f`.
      lhs: the input.
      rhs: the kernel. Its `i` is the input's features over the number of feature groups.
      out: the result. Its batch is the input's over the number of batch groups.
    """
    inputs, kernel, output = re.split("_|->", labels)
    parts = dict(part.split("=") for part in window[1:-1].split())
    dimensions = [str(d) for d in range(len(kernel) - 2)]

    def sizes(key: str, default: str) -> list[str]:
        return parts[key].split("x") if key in parts else [default] * len(dimensions)

    pairs = math.prod(
        _pairs(
            out.shape[output.index(d)],
            rhs.shape[kernel.index(d)],
            lhs.shape[inputs.index(d)],
            int(stride),
            int(spread),
            int(step),
            int(pad.split("_")[0]),
        )
        for d, stride, spread, step, pad in zip(
            dimensions,
            sizes("stride", "1"),
            sizes("lhs_dilate", "1"),
            sizes("rhs_dilate", "1"),
            sizes("pad", "0_0"),
            strict=True,
        )
    )
    batch, features = out.shape[output.index("b")], out.shape[output.index("f")]
    return flops_of_one(out) * batch * features * rhs.shape[kernel.index("i")] * pairs


def flops_of_one(array: Array) -> int:
    """FLOPs of a multiplication and an addition in the dtype of an array."""
    return 8 if array.dtype in ("c64", "c128") else 2


@functools.cache
def _pairs(places: int, taps: int, size: int, stride: int, spread: int, step: int, low: int) -> int:
    """Pairs of a place of the result and a tap of the window that meet an element of the input."""
    at = np.arange(places)[:, None] * stride + np.arange(taps) * step - low
    return int(np.sum((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)))

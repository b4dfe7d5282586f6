"""FLOPs of the primitives that multiply: matrix products and convolutions, and no others.

A multiplication and the addition of its result are 2 FLOPs; of complex numbers they are 8. Norms,
softmax and activations are not counted, as in every published MFU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np


def dot_general(eqn: Any) -> int:
    """`2 * |lhs| * (sizes of rhs that are neither contracted nor batch)`."""
    (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
    return _dot(eqn, {*contracted, *batch})


def ragged_dot_general(eqn: Any) -> int:
    """As `dot_general`: every row is in one group. The group sizes must sum to all rows."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    return _dot(eqn, {*contracted, *batch, *numbers.rhs_group_dimensions})


def conv_general_dilated(eqn: Any) -> int:
    """`2 * |batch| * |features out| * |features in| / groups * (pairs of place and tap)`.

    A tap that falls on padding, or on a zero between dilated places, is not counted. So a
    convolution, its input's gradient and its kernel's gradient have the same FLOPs.
    """
    p, (lhs, rhs), out = eqn.params, (v.aval for v in eqn.invars), eqn.outvars[0].aval
    numbers = p["dimension_numbers"]
    batch, features, *places = (out.shape[d] for d in numbers.out_spec)
    _, features_in, *taps = (rhs.shape[d] for d in numbers.rhs_spec)
    sizes = [lhs.shape[d] for d in numbers.lhs_spec[2:]]
    pairs = math.prod(
        _pairs(*dimension)
        for dimension in zip(
            places,
            taps,
            sizes,
            p["window_strides"],
            p["lhs_dilation"],
            p["rhs_dilation"],
            (low for low, _ in p["padding"]),
            strict=True,
        )
    )
    return _flops_of_one(lhs) * batch * features * features_in * pairs


RULES: dict[str, Callable[[Any], int]] = {
    rule.__name__: rule for rule in (dot_general, ragged_dot_general, conv_general_dilated)
}
"""FLOPs of an equation, by the name of its primitive."""


def _dot(eqn: Any, gone: set[int]) -> int:
    lhs, rhs = (v.aval for v in eqn.invars[:2])
    kept = (size for d, size in enumerate(rhs.shape) if d not in gone)
    return _flops_of_one(lhs) * math.prod(lhs.shape) * math.prod(kept)


def _pairs(places: int, taps: int, size: int, stride: int, spread: int, step: int, low: int) -> int:
    """Pairs of a place of the result and a tap of the kernel that meet a number of the input."""
    at = np.arange(places)[:, None] * stride + np.arange(taps) * step - low
    return int(np.sum((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)))


def _flops_of_one(operand: Any) -> int:
    return 8 if jnp.issubdtype(operand.dtype, jnp.complexfloating) else 2

"""Several products of one operand as one: kernels side by side, activations side by side.

    x . [w_1 | w_2]  =  [x . w_1 | x . w_2]
    [x_1 | x_2] . [w_1 / w_2]  =  x_1 . w_1 + x_2 . w_2

One wide product keeps the matrix unit busier than a narrow one after a wide one, its kernel travels
once, and a sum of products is summed in the product's own accumulator. Apart, the partial sums of
ViT-22B's four projections went through HBM in float32: 0.1 GB for each, chunk and way.

Hidden dimensions such as (heads, head_dim) are one dimension here, so that the product is that of
two matrices, whatever the layer calls its columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def column_kernel(kernels: Sequence[jax.Array]) -> jax.Array:
    """[d, f_i...] to [d, sum of f]."""
    return _joined([kernel.reshape(kernel.shape[0], -1) for kernel in kernels], 1)


def row_kernel(kernels: Sequence[jax.Array]) -> jax.Array:
    """[f_i..., d] to [sum of f, d]."""
    return _joined([kernel.reshape(-1, kernel.shape[-1]) for kernel in kernels], 0)


def activations(xs: Sequence[jax.Array], kernels: Sequence[jax.Array]) -> jax.Array:
    """[..., f_i...] to [..., sum of f], for the kernels [f_i..., d]."""
    flat = []
    for x, kernel in zip(xs, kernels, strict=True):
        lead = x.shape[: x.ndim - (kernel.ndim - 1)]
        flat.append(x.reshape(*lead, -1))
    return _joined(flat, flat[0].ndim - 1)


def apart(y: jax.Array, kernels: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """[..., sum of f] to the products [..., f_i...] with the kernels [d, f_i...]."""
    sizes = [math.prod(kernel.shape[1:]) for kernel in kernels]
    # The gradient of a split is one concatenation; that of slices is a sum of padded arrays.
    parts = [y] if len(kernels) == 1 else lax.split(y, sizes, axis=y.ndim - 1)
    lead = y.shape[:-1]
    return tuple(
        part.reshape(*lead, *kernel.shape[1:]) for part, kernel in zip(parts, kernels, strict=True)
    )


def _joined(arrays: Sequence[jax.Array], dim: int) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=dim)

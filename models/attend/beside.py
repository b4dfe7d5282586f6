"""Attention and MLP of a parallel block on one device, side by side in memory.

    [q k v of each head | h]   ->   [attention of each head | activation(h + b)]

One array comes in from the block's one product, and one goes out to its other. The kernels read
and write the heads' columns where they are, the activation writes its own behind them, and so
nothing is ever put together: as a concatenation, ViT-22B's step spent 115 ms of 3,260 on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from collective_matmul.dense import InPlace, Slab
from models.attend.pallas_tpu import Kernel, Scales, attend_within, gradient_within

Activation = Callable[[jax.Array], jax.Array]
Operands = tuple[jax.Array, Scales | None]


def middle(kernel: Kernel, activation: Activation) -> InPlace:
    """What is between a parallel block's two products, of the wide product and (bias, scales).

        wide    [b, s, h * 3 * d + f]
        bias    [f], of the hidden units
        scales  of the norms of queries and keys
        y       [b, s, h * d + f]

    Args:
      kernel: of the attention.
      activation: of the MLP, elementwise.
    """
    return InPlace(
        functools.partial(_function, kernel, activation),
        functools.partial(_gradient, kernel, activation),
    )


def _function(kernel: Kernel, activation: Activation, wide: Slab, operands: Operands) -> jax.Array:
    bias, scales = operands
    into, out_of = _ends(kernel)
    hidden = wide.read(into)
    hidden = hidden + _row(bias, hidden)
    y = attend_within(kernel, wide, scales, out_of + hidden.shape[-1])
    return _written(y, activation(hidden), out_of)


def _gradient(
    kernel: Kernel, activation: Activation, wide: Slab, operands: Operands, dy: jax.Array
) -> tuple[jax.Array, Operands]:
    bias, scales = operands
    into, out_of = _ends(kernel)
    dwide, dscales = gradient_within(kernel, wide, scales, dy)
    hidden = wide.read(into)
    hidden = hidden + _row(bias, hidden)
    (dhidden,) = jax.vjp(activation, hidden)[1](_behind(dy, out_of))
    dwide = _written(dwide, dhidden, into)
    # Summed from where it lies: an operation that made both would write the columns elsewhere.
    dwide = lax.optimization_barrier(dwide)
    dbias = _total(_behind(dwide, into)).astype(bias.dtype)
    return dwide, (dbias, dscales)


def _ends(kernel: Kernel) -> tuple[int, int]:
    """How many columns are the heads', in what comes and in what goes."""
    own = kernel.heads * kernel.head_dim
    return 3 * own, own


def _behind(x: jax.Array, first: int) -> jax.Array:
    return lax.slice_in_dim(x, first, x.shape[-1], axis=x.ndim - 1)


def _total(x: jax.Array) -> jax.Array:
    """The sum over all dimensions but the last, float32: a product with rows of ones.

    A matrix unit adds 201 MB up as fast as they are read, 10 ms of ViT-22B's step (v4, 16 x 16 x
    4); the compiler's own sum of bfloat16 takes 21.
    """
    ones = jnp.ones((8, *x.shape[:-1]), x.dtype)  # of one row it would make a sum again
    rows = list(range(1, ones.ndim)), list(range(x.ndim - 1))
    full = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    total: jax.Array = lax.dot_general(
        ones, x, (rows, ([], [])), precision=full, preferred_element_type=jnp.float32
    )
    return total[0]


def _written(x: jax.Array, columns: jax.Array, first: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, columns, first, axis=x.ndim - 1)


def _row(bias: jax.Array, x: jax.Array) -> jax.Array:
    return bias.reshape((1,) * (x.ndim - 1) + (-1,))

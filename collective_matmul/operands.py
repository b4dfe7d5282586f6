"""The operands of a dense layer, made alike; or refused, with the numbers and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from collective_matmul.arguments import common_dtype
from collective_matmul.layout import Layout
from collective_matmul.spec import nearest_multiples

MOST_DIMS = 7  # as many letters as the layers' einsums have for rows, or for hidden dimensions
Arrays = jax.Array | Sequence[jax.Array]
Biases = jax.Array | Sequence[jax.Array | None] | None


def arrays(value: Arrays) -> tuple[jax.Array, ...]:
    """One array or several, as a tuple."""
    return tuple(jnp.asarray(x) for x in (value if isinstance(value, (tuple, list)) else (value,)))


def biases_of(bias: Biases, kernel: Arrays) -> tuple[jax.Array | None, ...]:
    """One bias, or None, for each kernel; for an empty tuple of kernels, the one bias.

    Raises:
      ValueError: if there are several biases, but not one for each kernel.
    """
    n = (len(kernel) or 1) if isinstance(kernel, (tuple, list)) else 1
    biases = bias if isinstance(bias, (tuple, list)) else (bias,) * (n if bias is None else 1)
    if len(biases) != n:
        raise ValueError(
            f"{n} kernels but {len(biases)} biases; give one, or None, for each kernel"
        )
    return tuple(None if x is None else jnp.asarray(x) for x in biases)


def check_operands(
    xs: Sequence[jax.Array],
    kernels: Sequence[jax.Array],
    biases: Sequence[jax.Array | None],
    ndim: int | None = None,
) -> None:
    """Checks dtypes and ranks: kernels have `ndim` dimensions, or any number of at least two.

    Raises:
      TypeError: if the dtypes differ.
      ValueError: if a kernel has another rank.
    """
    common_dtype([*xs, *kernels, *(x for x in biases if x is not None)])
    for array in (*xs, *kernels):
        if array.ndim > MOST_DIMS:
            raise ValueError(
                f"an array of shape {array.shape} has {array.ndim} dimensions; merge some of them, "
                f"layers take at most {MOST_DIMS}"
            )
    for kernel in kernels:
        if kernel.ndim < 2 or kernel.ndim != (ndim or kernel.ndim):
            wanted = f"{ndim} dimensions" if ndim else "2 dimensions or more"
            raise ValueError(f"a kernel of shape {kernel.shape}; this layer's have {wanted}")


def check_product(
    x: jax.Array | jax.ShapeDtypeStruct, kernel: jax.Array, n: int, bias: jax.Array | None
) -> tuple[int, ...]:
    """Checks that x ends in the kernel's first `n` dimensions; returns the product's shape.

    Raises:
      ValueError: if it does not, or the bias has not the shape of the kernel's other dimensions.
    """
    if x.ndim <= n or x.shape[-n:] != kernel.shape[:n]:
        raise ValueError(
            f"x of shape {x.shape} does not fit a kernel of shape {kernel.shape}: x must have "
            f"dimensions of rows, and then end in {kernel.shape[:n]}"
        )
    if bias is not None and bias.shape != kernel.shape[n:]:
        raise ValueError(
            f"a kernel of shape {kernel.shape} takes a bias of shape {kernel.shape[n:]}, "
            f"got {bias.shape}"
        )
    return (*x.shape[:-n], *kernel.shape[n:])


def check_split(layout: Layout, name: str, x: jax.Array, spec: P) -> None:
    """Checks that every dimension splits over the axes that cut it.

    Raises:
      ValueError: if one does not, with the nearest sizes that do.
    """
    for dim, axes in enumerate(spec):
        t = layout.size(axes)
        if x.shape[dim] % t:
            raise ValueError(
                f"{name}: dimension {dim} of {x.shape} does not split over {axes!r}={t} devices; "
                f"the nearest sizes that do are {nearest_multiples(x.shape[dim], t)}"
            )

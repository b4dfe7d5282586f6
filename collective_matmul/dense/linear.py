"""One product: the kernel's columns cut, its rows cut, and a model's first layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from collective_matmul.dense.on_mesh import on_mesh
from collective_matmul.layout import Layout
from collective_matmul.operands import (
    Arrays,
    Biases,
    arrays,
    biases_of,
    check_operands,
    check_product,
)
from collective_matmul.per_device import column_spec, columns, embedding, rows


def column_parallel(
    x: jax.Array, kernel: Arrays, bias: Biases = None, *, layout: Layout | None
) -> Any:
    """`y[..., f...] = x[..., d] . kernel[d, f...] + bias[f...]`, the kernel's columns cut.

    The activations are gathered over the tensor axis while they are multiplied: their rows
    (`"tokens"`) or, accumulating, their features (`"features"`). Parameters that are cut over fsdp
    too are gathered for use, and their gradients reduce-scattered.

    Args:
      x: [b@data, s@tensor, d] for `"tokens"`, [b@data, s, d@tensor] for `"features"`; any number of
        dimensions between the first and the last.
      kernel: [d@fsdp, f@tensor, ...], the first hidden dimension cut, so that [d, heads, head_dim]
        is cut by heads. A tuple of kernels is fed by one gather.
      bias: [f@tensor, ...], or a tuple of such arrays or Nones.
      layout: where the arrays lie, or None for one device.

    Returns:
      [b@data, s, f@tensor, ...] in the operands' dtype, or a tuple of such arrays.

    Raises:
      ValueError: if sizes contradict, or do not split over their axes, with the nearest that do.
      TypeError: if the operands have different dtypes.
      NotImplementedError: if the layout names an algorithm or backend that cannot run this.
    """
    x, kernels, biases = jnp.asarray(x), arrays(kernel), biases_of(bias, kernel)
    check_operands((x,), kernels, biases)
    for w, b in zip(kernels, biases, strict=True):
        check_product(x, w, 1, b)
    specs = [column_spec(x.ndim, w.ndim) for w in kernels]
    results = on_mesh(
        layout,
        columns,
        {"x": x, "kernel": kernels, "bias": biases},
        lambda at: (
            at.activation(x.ndim),
            tuple(at.column_kernel(w.ndim) for w in kernels),
            tuple(None if b is None else at.column_bias(b.ndim) for b in biases),
        ),
        lambda at: tuple(
            at.hidden(len(spec.out), w.ndim) for spec, w in zip(specs, kernels, strict=True)
        ),
    )
    return results if isinstance(kernel, (tuple, list)) else results[0]


def row_parallel(
    x: Arrays, kernel: Arrays, bias: jax.Array | None = None, *, layout: Layout | None
) -> jax.Array:
    """`y[..., d] = x[..., f...] . kernel[f..., d] + bias[d]`, the kernel's rows cut.

    Each device's product is a partial sum; the sums travel over the tensor axis while the next
    piece is multiplied, and each device keeps its rows (`"tokens"`) or features (`"features"`).

    Args:
      x: [b@data, s, f@tensor, ...], as `column_parallel` returns it; or a tuple of such arrays.
      kernel: [f@tensor, ..., d@fsdp], contracted in all its dimensions but the last; or a tuple,
        paired with x: one scatter carries the sum of the products.
      bias: [d], added once.
      layout: where the arrays lie, or None for one device.

    Returns:
      [b@data, s@tensor, d] for `"tokens"`, [b@data, s, d@tensor] for `"features"`.

    Raises:
      ValueError, TypeError, NotImplementedError: as `column_parallel`.
    """
    xs, kernels = arrays(x), arrays(kernel)
    (bias,) = biases_of(bias, ())
    if len(xs) != len(kernels):
        raise ValueError(f"{len(xs)} arrays x but {len(kernels)} kernels; they are paired")
    check_operands(xs, kernels, (bias,))
    shapes = [check_product(y, w, w.ndim - 1, bias) for y, w in zip(xs, kernels, strict=True)]
    if len(set(shapes)) > 1:
        raise ValueError(f"the products are summed, so their shapes must agree; they are {shapes}")
    return on_mesh(
        layout,
        rows,
        {"x": xs, "kernel": kernels, "bias": bias},
        lambda at: (
            tuple(at.hidden(y.ndim, w.ndim) for y, w in zip(xs, kernels, strict=True)),
            tuple(at.row_kernel(w.ndim) for w in kernels),
            None if bias is None else at.row_bias(),
        ),
        lambda at: at.activation(len(shapes[0])),
    )


def embed(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, layout: Layout | None
) -> jax.Array:
    """`y[..., d] = x[..., c] . kernel[c, d] + bias[d]`: from features that no axis cuts.

    The first layer of a model. For `"tokens"` every device has rows of its own, and the kernel's
    pieces travel to them (`gather_rhs`). For `"features"` every device makes its features of all
    rows, and nothing has to travel.

    Args:
      x: [b@data, s@tensor, c] for `"tokens"`, [b@data, s, c] for `"features"`.
      kernel: [c, d@(fsdp, tensor)] for `"tokens"`, [c, d@tensor] for `"features"`.
      bias: [d].
      layout: where the arrays lie, or None for one device.

    Returns:
      [b@data, s@tensor, d] for `"tokens"`, [b@data, s, d@tensor] for `"features"`.

    Raises:
      ValueError, TypeError, NotImplementedError: as `column_parallel`.
    """
    x, (kernel,), (bias,) = jnp.asarray(x), arrays(kernel), biases_of(bias, ())
    check_operands((x,), (kernel,), (bias,), ndim=2)
    check_product(x, kernel, 1, bias)
    return on_mesh(
        layout,
        embedding,
        {"x": x, "kernel": kernel, "bias": bias},
        lambda at: (
            at.unsharded(x.ndim),
            at.embed_kernel(),
            None if bias is None else at.row_bias(),
        ),
        lambda at: at.activation(x.ndim),
    )

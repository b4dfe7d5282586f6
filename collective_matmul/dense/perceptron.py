"""Two products and an activation between them."""

from __future__ import annotations

from collections.abc import Callable
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
from collective_matmul.per_device import columns, rows


def mlp(
    x: jax.Array,
    kernel_in: Arrays,
    kernel_out: jax.Array,
    bias_in: Biases = None,
    bias_out: jax.Array | None = None,
    *,
    activation: Callable[[jax.Array], jax.Array],
    layout: Layout | None,
) -> jax.Array:
    """`y = activation(x . kernel_in + bias_in) . kernel_out + bias_out`, in one shard_map.

    With two kernels, `(gate, up)`, the hidden layer is `activation(x . gate) * (x . up)`.

    Args:
      x: [b@data, s@tensor, d] for `"tokens"`, [b@data, s, d@tensor] for `"features"`.
      kernel_in: [d@fsdp, f@tensor], or a pair (gate, up) of them, fed by one gather.
      kernel_out: [f@tensor, d@fsdp].
      bias_in: [f@tensor], or a pair.
      bias_out: [d].
      activation: elementwise, applied to this device's hidden units.
      layout: where the arrays lie, or None for one device.

    Returns:
      As x.

    Raises:
      ValueError: also if there are more than two kernels in; else as `column_parallel`.
      TypeError, NotImplementedError: as `column_parallel`.
    """
    x, kernels, biases = jnp.asarray(x), arrays(kernel_in), biases_of(bias_in, kernel_in)
    (kernel_out,), (bias_out,) = arrays(kernel_out), biases_of(bias_out, ())
    if len(kernels) > 2:
        raise ValueError(f"an MLP has one kernel in, or a (gate, up) pair; got {len(kernels)}")
    check_operands((x,), (*kernels, kernel_out), (*biases, bias_out), ndim=2)
    for w, b in zip(kernels, biases, strict=True):
        hidden = jax.ShapeDtypeStruct(check_product(x, w, 1, b), x.dtype)
        check_product(hidden, kernel_out, 1, bias_out)

    def body(layout: Layout | None, x: Any, w_in: Any, w_out: Any, b_in: Any, b_out: Any) -> Any:
        gate, *up = columns(layout, x, w_in, b_in)
        units = activation(gate)
        return rows(layout, (units * up[0] if up else units,), (w_out,), b_out)

    return on_mesh(
        layout,
        body,
        {
            "x": x,
            "kernel_in": kernels,
            "kernel_out": kernel_out,
            "bias_in": biases,
            "bias_out": bias_out,
        },
        lambda at: (
            at.activation(x.ndim),
            tuple(at.column_kernel() for _ in kernels),
            at.row_kernel(),
            tuple(None if b is None else at.column_bias() for b in biases),
            None if bias_out is None else at.row_bias(),
        ),
        lambda at: at.activation(x.ndim),
    )

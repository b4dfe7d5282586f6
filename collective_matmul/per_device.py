"""What one device does in a dense layer: its shards in, its shards out.

The bodies of `dense.py`'s shard_maps. With `layout=None` the one device holds everything.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from collective_matmul import joined
from collective_matmul.collectives import all_gather
from collective_matmul.einsum import collective_einsum
from collective_matmul.layout import Layout
from collective_matmul.operation import Operand
from collective_matmul.product import product
from collective_matmul.replay import replayed
from collective_matmul.spec import Spec
from collective_matmul.varying import varying_like

ROWS, HIDDEN = "bstuvw", "fghijk"


def column_spec(x_ndim: int, kernel_ndim: int) -> Spec:
    """`...d,df...->...f...`: for [b, s, d] and [d, heads, head_dim], `bsd,dfg->bsfg`."""
    rows, hidden = ROWS[: x_ndim - 1], HIDDEN[: kernel_ndim - 1]
    return Spec(f"{rows}d", f"d{hidden}", f"{rows}{hidden}")


def row_spec(x_ndim: int, kernel_ndim: int) -> Spec:
    """`...f...,f...d->...d`: for [b, s, h, head_dim] and [h, head_dim, d], `bsfg,fgd->bsd`."""
    hidden = HIDDEN[: kernel_ndim - 1]
    rows = ROWS[: x_ndim - len(hidden)]
    return Spec(f"{rows}{hidden}", f"{hidden}d", f"{rows}d")


def columns(
    layout: Layout | None,
    x: jax.Array,
    kernels: Sequence[jax.Array],
    biases: Sequence[jax.Array | None],
) -> tuple[jax.Array, ...]:
    """`y_i = G(x) . w_i + b_i`."""
    specs = [column_spec(x.ndim, kernel.ndim) for kernel in kernels]
    if layout is None:
        results = tuple(
            _alone(spec, x, kernel) for spec, kernel in zip(specs, kernels, strict=True)
        )
    else:
        wide = wide_columns(layout, x, joined.column_kernel(kernels))
        results = joined.apart(wide, kernels)
    return tuple(_plus(y, bias) for y, bias in zip(results, biases, strict=True))


def wide_columns(layout: Layout | None, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`y = G(x) . w`, for a kernel [d, f]."""
    if layout is None:
        return _alone(column_spec(x.ndim, 2), x, kernel)
    spec = str(column_spec(x.ndim, 2))
    if layout.size(layout.tensor) == 1 and layout.fsdp:
        return collective_einsum(spec, x, kernel, layout.fsdp, gather_rhs="d", **_options(layout))

    def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return collective_einsum(
            spec,
            x,
            _fetched(layout, kernel, 0, x),
            layout.tensor,
            gather_lhs=_moved(layout),
            **_options(layout),
        )

    return _fetching_anew(layout, multiply)(x, kernel)


def rows(
    layout: Layout | None,
    xs: Sequence[jax.Array],
    kernels: Sequence[jax.Array],
    bias: jax.Array | None,
) -> jax.Array:
    """`y = S(sum_i x_i . w_i) + b`."""
    if layout is None:
        specs = [row_spec(x.ndim, kernel.ndim) for x, kernel in zip(xs, kernels, strict=True)]
        products = [_unrounded(spec, *xw) for spec, *xw in zip(specs, xs, kernels, strict=True)]
        total = functools.reduce(operator.add, products).astype(xs[0].dtype)
    else:
        total = wide_rows(layout, joined.activations(xs, kernels), joined.row_kernel(kernels))
    return _plus(total, bias)


def wide_rows(layout: Layout | None, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`y = S(x . w)`, for a kernel [f, d]."""
    if layout is None:
        return _alone(row_spec(x.ndim, 2), x, kernel)
    spec = str(row_spec(x.ndim, 2))
    if layout.size(layout.tensor) == 1 and layout.fsdp:
        return collective_einsum(spec, x, kernel, layout.fsdp, gather_rhs="d", **_options(layout))

    def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _scattered(layout, x, _fetched(layout, kernel, 1, x))

    return _fetching_anew(layout, multiply)(x, kernel)


def _scattered(layout: Layout, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`y = S(x . w)` over the tensor axis, for a kernel [f, d] that is there."""
    return collective_einsum(
        str(row_spec(x.ndim, 2)),
        x,
        kernel,
        layout.tensor,
        scatter=_moved(layout),
        **_options(layout),
    )


def between(
    layout: Layout | None,
    x: jax.Array,
    kernels_in: Sequence[jax.Array],
    kernels_out: Sequence[jax.Array],
    operands: Sequence[Any],
    bias: jax.Array | None,
    *,
    middle: Callable[..., jax.Array],
    name: str | None,
) -> jax.Array:
    """`y = S(middle(G(x) . [w_1 | w_2 ..], *operands) . [v_1 / v_2 ..]) + b`."""

    def rest(wide: jax.Array, kernel: jax.Array, operands: Sequence[Any]) -> jax.Array:
        if layout is None or layout.size(layout.tensor) == 1:
            return wide_rows(layout, middle(wide, *operands), kernel)
        # The kernel is there before the middle begins, so it travels under the product before it;
        # else the compiler fetches it afterwards, under nothing: 20 ms of ViT-22B's step.
        whole, wide = lax.optimization_barrier((_fetched(layout, kernel, 1, wide), wide))
        return _scattered(layout, middle(wide, *operands), whole)

    wide = wide_columns(layout, x, joined.column_kernel(kernels_in))
    y = replayed(rest, name)(wide, joined.row_kernel(kernels_out), tuple(operands))
    return _plus(y, bias)


def embedding(
    layout: Layout | None, x: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """`y = x . G(w) + b`, or `x . w + b` where nothing has to travel."""
    spec = Spec(f"{ROWS[: x.ndim - 1]}c", "cd", f"{ROWS[: x.ndim - 1]}d")
    if layout is None or layout.activations == "features":
        return _plus(_alone(spec, x, kernel, layout and layout.precision), bias)
    y = collective_einsum(
        str(spec), x, kernel, layout.gathered_axes, gather_rhs="d", **_options(layout)
    )
    return _plus(y, bias)


def _moved(layout: Layout) -> str:
    """The letter of the activations that the tensor axis cuts."""
    return "d" if layout.activations == "features" else ROWS[layout.token_dim]


def _options(layout: Layout) -> dict[str, Any]:
    return {
        "algorithm": layout.algorithm,
        "backend": layout.backend,
        "wire_dtype": layout.wire_dtype,
        "precision": layout.precision,
    }


def _fetching_anew(layout: Layout, multiply: Callable[..., Any]) -> Callable[..., Any]:
    """`multiply`, which keeps the kernel's shards for the backward pass and fetches them again.

    Kept whole, the kernels of all layers would lie on every device at once.
    """
    return jax.checkpoint(multiply) if layout.size(layout.fsdp) > 1 else multiply


def _fetched(layout: Layout, kernel: jax.Array, dim: int, x: jax.Array) -> jax.Array:
    """The kernel whole in its model width, gathered over fsdp for its product with x.

    It is typed as varying over x's axes beforehand: so the gradient is summed over the data axis
    after it is reduce-scattered over fsdp, when it is smallest.
    """
    if layout.fsdp is None:
        return kernel
    return all_gather(
        varying_like(kernel, x),
        layout.fsdp,
        dim=dim,
        algorithm=layout.algorithm,
        backend=layout.backend,
        wire_dtype=layout.wire_dtype,
    )


def _unrounded(spec: Spec, x: jax.Array, kernel: jax.Array, precision: Any = None) -> jax.Array:
    return product(spec, x, kernel, Operand((), np.dtype(x.dtype)), precision)


def _alone(spec: Spec, x: jax.Array, kernel: jax.Array, precision: Any = None) -> jax.Array:
    return _unrounded(spec, x, kernel, precision).astype(x.dtype)


def _plus(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - bias.ndim) + bias.shape)

"""Columns, rows and the first layer: one product each, with what it needs gathered or summed."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax

from collective_matmul import joined
from collective_matmul.einsum import collective_einsum
from collective_matmul.layout import Layout
from collective_matmul.per_device.calls import (
    ROWS,
    alone,
    column_spec,
    fetched,
    gathered,
    options,
    plus,
    row_spec,
    scattered,
    unrounded,
)
from collective_matmul.spec import Spec
from collective_matmul.varying import varying_axes


def columns(
    layout: Layout | None,
    x: jax.Array,
    kernels: Sequence[jax.Array],
    biases: Sequence[jax.Array | None],
) -> tuple[jax.Array, ...]:
    """`y_i = G(x) . w_i + b_i`."""
    specs = [column_spec(x.ndim, kernel.ndim) for kernel in kernels]
    if layout is None:
        results = tuple(alone(spec, x, kernel) for spec, kernel in zip(specs, kernels, strict=True))
    else:
        wide = wide_columns(layout, x, joined.column_kernel(kernels))
        results = joined.apart(wide, kernels)
    return tuple(plus(y, bias) for y, bias in zip(results, biases, strict=True))


def wide_columns(layout: Layout | None, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`y = G(x) . w`, for a kernel [d, f]."""
    return _wide(layout, column_spec(x.ndim, 2), x, kernel, gathered)


def rows(
    layout: Layout | None,
    xs: Sequence[jax.Array],
    kernels: Sequence[jax.Array],
    bias: jax.Array | None,
) -> jax.Array:
    """`y = S(sum_i x_i . w_i) + b`."""
    if layout is None:
        specs = [row_spec(x.ndim, kernel.ndim) for x, kernel in zip(xs, kernels, strict=True)]
        products = [unrounded(spec, *xw) for spec, *xw in zip(specs, xs, kernels, strict=True)]
        total = functools.reduce(operator.add, products).astype(xs[0].dtype)
    else:
        total = wide_rows(layout, joined.activations(xs, kernels), joined.row_kernel(kernels))
    return plus(total, bias)


def wide_rows(layout: Layout | None, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`y = S(x . w)`, for a kernel [f, d]."""
    return _wide(layout, row_spec(x.ndim, 2), x, kernel, scattered)


def _wide(
    layout: Layout | None,
    spec: Spec,
    x: jax.Array,
    kernel: jax.Array,
    product: Callable[[Layout, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """A product with a kernel that is fetched for it, where anything is to be fetched."""
    if layout is None:
        return alone(spec, x, kernel)
    if layout.size(layout.tensor) == 1 and layout.fsdp:
        return collective_einsum(
            str(spec), x, kernel, layout.fsdp, gather_rhs="d", **options(layout)
        )

    def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return product(
            layout, x, fetched(layout, kernel, (spec.rhs or "").index("d"), varying_axes(x))
        )

    return _fetching_anew(layout, multiply)(x, kernel)


def _fetching_anew(layout: Layout, multiply: Callable[..., Any]) -> Callable[..., Any]:
    """`multiply`, which keeps the kernel's shards for the backward pass and fetches them again.

    Kept whole, the kernels of all layers would lie on every device at once.
    """
    return jax.checkpoint(multiply) if layout.size(layout.fsdp) > 1 else multiply


def embedding(
    layout: Layout | None, x: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """`y = x . G(w) + b`, or `x . w + b` where nothing has to travel."""
    spec = Spec(f"{ROWS[: x.ndim - 1]}c", "cd", f"{ROWS[: x.ndim - 1]}d")
    if layout is None or layout.activations == "features":
        return plus(alone(spec, x, kernel, layout and layout.precision), bias)
    y = collective_einsum(
        str(spec), x, kernel, layout.gathered_axes, gather_rhs="d", **options(layout)
    )
    return plus(y, bias)

"""A product, what one device does with it, and a second product: in an order that hides hops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from collective_matmul import joined, stepwise
from collective_matmul.layout import Layout
from collective_matmul.per_device.calls import (
    fetched,
    gather,
    gathered,
    plus,
    scatter,
    scattered,
)
from collective_matmul.per_device.linear import wide_columns, wide_rows
from collective_matmul.replay import replayed
from collective_matmul.steps import Steps, finish
from collective_matmul.varying import varying_axes, varying_over


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
    kernel_in, kernel_out = joined.column_kernel(kernels_in), joined.row_kernel(kernels_out)
    if layout is None or layout.size(layout.tensor) == 1:

        def rest(wide: jax.Array, kernel: jax.Array, operands: Sequence[Any]) -> jax.Array:
            return wide_rows(layout, middle(wide, *operands), kernel)

        wide = wide_columns(layout, x, kernel_in)
        y = replayed(rest, name)(wide, kernel_out, tuple(operands))
    else:
        y = _in_order(layout, middle, name)(x, kernel_in, kernel_out, tuple(operands))
    return plus(y, bias)


def _in_order(
    layout: Layout, middle: Callable[..., jax.Array], name: str | None
) -> Callable[..., jax.Array]:
    """`S(middle(G(x) . w) . v)`, its products in an order that leaves something to hide under.

    The compiler orders independent work as it likes: it fetched the kernels where no product was
    left to be beside them. Here, of ViT-22B's step (v4, 16 x 16 x 4) by 55 ms less, v travels under
    the product with w forwards, and w under dv backwards.
    """
    fetch = functools.partial(fetched, layout)

    def forward(
        x: jax.Array, kernel_in: jax.Array, kernel_out: jax.Array, operands: tuple[Any, ...]
    ) -> tuple[jax.Array, Any]:
        axes = varying_axes(x)
        wide = gathered(layout, x, fetch(kernel_in, 0, axes))
        kept = wide if name is None else checkpoint_name(wide, name)
        whole, wide = lax.optimization_barrier((fetch(kernel_out, 1, axes), wide))
        y = scattered(layout, middle(wide, *operands), whole)
        return y, (x, kernel_in, kernel_out, operands, kept)

    def backward(kept: Any, dy: jax.Array) -> Any:
        x, kernel_in, kernel_out, operands, wide = kept
        # Sums over the data axes come last: a barrier would undo what types say of them.
        axes = varying_axes(x)
        kernel_in, sum_in = jax.vjp(lambda k: varying_over(k, axes), kernel_in)
        kernel_out, sum_out = jax.vjp(lambda k: varying_over(k, axes), kernel_out)
        w, back_w = jax.vjp(lambda k: fetch(k, 0, axes), kernel_in)
        v, back_v = jax.vjp(lambda k: fetch(k, 1, axes), kernel_out)
        m, back_middle = jax.vjp(middle, wide, *operands)
        dx, dw, dv, doperands = finish(gradient(layout, x, w, m, v, back_middle, dy))
        return dx, *sum_in(*back_w(dw)), *sum_out(*back_v(dv)), doperands

    run = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    run.defvjp(forward, backward)
    return run


def gradient(
    layout: Layout,
    x: jax.Array,
    w: jax.Array,
    m: jax.Array,
    v: jax.Array,
    back_middle: Callable[[jax.Array], tuple[Any, ...]],
    dy: jax.Array,
) -> Steps[tuple[jax.Array, jax.Array, jax.Array, tuple[Any, ...]]]:
    """dx, dw, dv and doperands of `S(m . v)`, where `m = middle(G(x) . w, *operands)`.

    First dv; then dw, and dx last, under which what is left of x's own journey and the sums of dv
    and dw may travel.
    """
    dm, dv = yield from stepwise.gradient_of_scatter(scatter(layout, m, v), dy)
    dwide, *doperands = back_middle(dm)
    dwide, dv, w = lax.optimization_barrier((dwide, dv, w))
    wide_product = gather(layout, x, w)
    dw = yield from stepwise.gradient_of_other(wide_product, dwide)
    dwide, dw = lax.optimization_barrier((dwide, dw))
    dx = yield from stepwise.gradient_of_moved(wide_product, dwide)
    return dx, dw, dv, tuple(doperands)

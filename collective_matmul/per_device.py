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
from jax.ad_checkpoint import checkpoint_name

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
    return _wide(layout, column_spec(x.ndim, 2), x, kernel, _gathered)


def wide_rows(layout: Layout | None, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`y = S(x . w)`, for a kernel [f, d]."""
    return _wide(layout, row_spec(x.ndim, 2), x, kernel, _scattered)


def _wide(
    layout: Layout | None,
    spec: Spec,
    x: jax.Array,
    kernel: jax.Array,
    product: Callable[[Layout, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """A product with a kernel that is fetched for it, where anything is to be fetched."""
    if layout is None:
        return _alone(spec, x, kernel)
    if layout.size(layout.tensor) == 1 and layout.fsdp:
        return collective_einsum(
            str(spec), x, kernel, layout.fsdp, gather_rhs="d", **_options(layout)
        )

    def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return product(layout, x, _fetched(layout, kernel, (spec.rhs or "").index("d"), x))

    return _fetching_anew(layout, multiply)(x, kernel)


def _gathered(layout: Layout, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`y = G(x) . w` over the tensor axis, for a kernel [d, f] that is there."""
    return collective_einsum(
        str(column_spec(x.ndim, 2)),
        x,
        kernel,
        layout.tensor,
        gather_lhs=_moved(layout),
        **_options(layout),
    )


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
    kernel_in, kernel_out = joined.column_kernel(kernels_in), joined.row_kernel(kernels_out)
    if layout is None or layout.size(layout.tensor) == 1:

        def rest(wide: jax.Array, kernel: jax.Array, operands: Sequence[Any]) -> jax.Array:
            return wide_rows(layout, middle(wide, *operands), kernel)

        wide = wide_columns(layout, x, kernel_in)
        y = replayed(rest, name)(wide, kernel_out, tuple(operands))
    else:
        y = _in_order(layout, middle, name)(x, kernel_in, kernel_out, tuple(operands))
    return _plus(y, bias)


def _in_order(
    layout: Layout, middle: Callable[..., jax.Array], name: str | None
) -> Callable[..., jax.Array]:
    """`S(middle(G(x) . w) . v)`, its products in an order that leaves something to hide under.

    The compiler orders independent work as it likes: it fetched the kernels where no product was
    left to be beside them. Here, of ViT-22B's step (v4, 16 x 16 x 4) by 55 ms less,

        forwards     v travels under the product with w
        backwards    w travels under dv; then dw, and dx last, under which what is left of x's own
                     journey and the sums of dv and dw may travel
    """

    fetch, gathered, scattered = (
        functools.partial(function, layout) for function in (_fetched, _gathered, _scattered)
    )

    def forward(
        x: jax.Array, kernel_in: jax.Array, kernel_out: jax.Array, operands: tuple[Any, ...]
    ) -> tuple[jax.Array, Any]:
        wide = gathered(x, fetch(kernel_in, 0, x))
        kept = wide if name is None else checkpoint_name(wide, name)
        whole, wide = lax.optimization_barrier((fetch(kernel_out, 1, x), wide))
        y = scattered(middle(wide, *operands), whole)
        return y, (x, kernel_in, kernel_out, operands, kept)

    def backward(kept: Any, dy: jax.Array) -> Any:
        x, kernel_in, kernel_out, operands, wide = kept
        # Sums over the data axes come last: a barrier would undo what types say of them.
        kernel_in, sum_in = jax.vjp(lambda k: varying_like(k, x), kernel_in)
        kernel_out, sum_out = jax.vjp(lambda k: varying_like(k, x), kernel_out)
        v, back_v = jax.vjp(lambda k: fetch(k, 1, x), kernel_out)
        m, back_middle = jax.vjp(middle, wide, *operands)
        dm, dv = jax.vjp(scattered, m, v)[1](dy)
        dwide, *doperands = back_middle(dm)
        w, back_w = jax.vjp(lambda k: fetch(k, 0, x), kernel_in)
        dwide, dv, w = lax.optimization_barrier((dwide, dv, w))
        (dw,) = jax.vjp(lambda w: gathered(x, w), w)[1](dwide)
        dwide, dw = lax.optimization_barrier((dwide, dw))
        (dx,) = jax.vjp(lambda x: gathered(x, w), x)[1](dwide)
        return dx, *sum_in(*back_w(dw)), *sum_out(*back_v(dv)), tuple(doperands)

    run = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    run.defvjp(forward, backward)
    return run


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

"""The primitive as a layer uses it: which operation a layout makes of an x and a kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from collective_matmul.arguments import Call, Options, axis_size, read
from collective_matmul.collectives import all_gather
from collective_matmul.duality import run
from collective_matmul.layout import Layout
from collective_matmul.operation import Operand
from collective_matmul.product import product
from collective_matmul.spec import Spec
from collective_matmul.varying import varying_over

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


def gathered(layout: Layout, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`y = G(x) . w` over the tensor axis, for a kernel [d, f] that is there."""
    y: jax.Array = run(gather(layout, x, kernel))
    return y


def gather(layout: Layout, x: Any, kernel: Any) -> Call:
    """What `gathered` runs; of arrays, or what has their shapes and dtypes."""
    return _call(layout, column_spec(x.ndim, 2), x, kernel, gather_lhs=moved(layout))


def scattered(layout: Layout, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`y = S(x . w)` over the tensor axis, for a kernel [f, d] that is there."""
    y: jax.Array = run(scatter(layout, x, kernel))
    return y


def scatter(layout: Layout, x: jax.Array, kernel: jax.Array) -> Call:
    """What `scattered` runs."""
    return _call(layout, row_spec(x.ndim, 2), x, kernel, scatter=moved(layout))


def _call(layout: Layout, spec: Spec, x: Any, kernel: Any, **mode: str) -> Call:
    modes: dict[str, Any] = {"gather_lhs": None, "gather_rhs": None, "scatter": None, **mode}
    t = axis_size(layout.tensor)
    how = Options(**options(layout))
    return read(str(spec), x, kernel, layout.tensor, t, **modes, options=how)


def moved(layout: Layout) -> str:
    """The letter of the activations that the tensor axis cuts."""
    return "d" if layout.activations == "features" else ROWS[layout.token_dim]


def options(layout: Layout) -> dict[str, Any]:
    """How a product runs."""
    return {**travelling(layout), "precision": layout.precision}


def travelling(layout: Layout) -> dict[str, Any]:
    """How a collective alone runs."""
    return {
        "algorithm": layout.algorithm,
        "backend": layout.backend,
        "wire_dtype": layout.wire_dtype,
    }


def fetched(layout: Layout, kernel: jax.Array, dim: int, axes: frozenset[str]) -> jax.Array:
    """The kernel whole in its model width, gathered over fsdp for its product with x.

    It is typed as varying over x's axes beforehand: so the gradient is summed over the data axis
    after it is reduce-scattered over fsdp, when it is smallest.
    """
    if layout.fsdp is None:
        return kernel
    return all_gather(varying_over(kernel, axes), layout.fsdp, dim=dim, **travelling(layout))


def unrounded(spec: Spec, x: jax.Array, kernel: jax.Array, precision: Any = None) -> jax.Array:
    """The product on one device, in the dtype that it is summed in."""
    return product(spec, x, kernel, Operand((), np.dtype(x.dtype)), precision)


def alone(spec: Spec, x: jax.Array, kernel: jax.Array, precision: Any = None) -> jax.Array:
    """The product on one device."""
    return unrounded(spec, x, kernel, precision).astype(x.dtype)


def plus(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`y + b`, the last dimensions of y as those of b."""
    return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - bias.ndim) + bias.shape)

"""Linear layers as flax nnx modules: parameters as in flax, products as in `dense`.

The operands are cast to the compute dtype before anything travels, so what crosses the wire is as
narrow as what is multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.sharding import PartitionSpec as P

from collective_matmul import dense
from collective_matmul.layout import Layout

default_kernel_init = nnx.initializers.lecun_normal()
default_bias_init = nnx.initializers.zeros_init()


class _Linear(nnx.Module):
    """`kernel: [*in, *out]` and `bias: [*out]`, initialised as flax's `LinearGeneral` does."""

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        layout: Layout | None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features = _sizes(in_features)
        self.out_features = _sizes(out_features)
        self.layout = layout
        self.dtype = dtype
        fan_in, fan_out = math.prod(self.in_features), math.prod(self.out_features)
        kernel = kernel_init(rngs.params(), (fan_in, fan_out), param_dtype)
        self.kernel = nnx.Param(kernel.reshape(*self.in_features, *self.out_features))
        self.bias: nnx.Param | None = nnx.data(None)
        if use_bias:
            bias = bias_init(rngs.params(), (fan_out,), param_dtype)
            self.bias = nnx.Param(bias.reshape(self.out_features))

    def partition_specs(self) -> dict[str, P]:
        """Where each parameter lies on the layout's mesh."""
        raise NotImplementedError


class ColumnParallel(_Linear):
    """`y[..., f...] = x[..., d] . kernel[d, f...] + bias[f...]`, see `dense.column_parallel`.

    Args:
      in_features: d.
      out_features: f, or several sizes such as (heads, head_dim), the first cut over tensor.
      layout: where arrays lie, or None for one device.
      use_bias: whether there is a bias.
      dtype: what x and the parameters are cast to before anything travels; None: their common one.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernel, called with the shape (d, product of f).
      bias_init: initialiser of the bias.
      rngs: where the initialisers' keys come from, the stream `params`.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b@data, s@tensor, d]` or `[b@data, s, d@tensor]` to `[b@data, s, f@tensor, ...]`."""
        return column(x, self)[0]

    def partition_specs(self) -> dict[str, P]:
        """`kernel: [d@fsdp, f@tensor, ...]` and `bias: [f@tensor, ...]`."""
        if self.layout is None:
            return {}
        n = len(self.out_features)
        return {"kernel": self.layout.column_kernel(1 + n), "bias": self.layout.column_bias(n)}


class RowParallel(_Linear):
    """`y[..., d] = x[..., f...] . kernel[f..., d] + bias[d]`, see `dense.row_parallel`.

    Args:
      in_features: f, or several sizes such as (heads, head_dim), all contracted.
      out_features: d.
      layout, use_bias, dtype, param_dtype, kernel_init, bias_init, rngs: as in `ColumnParallel`.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b@data, s, f@tensor, ...]` to `[b@data, s@tensor, d]` or `[b@data, s, d@tensor]`."""
        return row((x,), self)

    def partition_specs(self) -> dict[str, P]:
        """`kernel: [f@tensor, ..., d@fsdp]`; `bias: [d]` or `[d@tensor]`."""
        if self.layout is None:
            return {}
        n = len(self.in_features)
        return {"kernel": self.layout.row_kernel(n + 1), "bias": self.layout.row_bias()}


class InputProjection(_Linear):
    """`y[..., d] = x[..., c] . kernel[c, d] + bias[d]`, a model's first layer, see `dense.embed`.

    Args:
      in_features: c, which no axis cuts.
      out_features: d.
      layout, use_bias, dtype, param_dtype, kernel_init, bias_init, rngs: as in `ColumnParallel`.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b@data, s@tensor, c]` or `[b@data, s, c]` to the same with d, or d@tensor, for c."""
        dtype = compute_dtype(x, self)
        kernel, bias = parameters_of(self, dtype)
        return dense.embed(x.astype(dtype), kernel, bias, layout=self.layout)

    def partition_specs(self) -> dict[str, P]:
        """`kernel: [c, d@(fsdp, tensor)]` or `[c, d@tensor]`; `bias: [d]` or `[d@tensor]`."""
        if self.layout is None:
            return {}
        return {"kernel": self.layout.embed_kernel(), "bias": self.layout.row_bias()}


def column(x: jax.Array, *modules: ColumnParallel) -> tuple[jax.Array, ...]:
    """The outputs of all modules for one x, gathered once.

    Args:
      x: [b@data, s@tensor, d] for `"tokens"`, [b@data, s, d@tensor] for `"features"`.
      *modules: layers of one layout and one dtype.

    Returns:
      [b@data, s, f@tensor, ...] for each module.

    Raises:
      ValueError: if layouts or dtypes differ; else as `dense.column_parallel`.
    """
    layout, dtype = layout_of(modules), compute_dtype(x, *modules)
    kernels, biases = zip(*(parameters_of(module, dtype) for module in modules), strict=True)
    return dense.column_parallel(x.astype(dtype), kernels, biases, layout=layout)


def row(xs: Sequence[jax.Array], *modules: RowParallel) -> jax.Array:
    """The sum of the modules' outputs, scattered once.

    Args:
      xs: [b@data, s, f@tensor, ...], one for each module.
      *modules: layers of one layout and one dtype.

    Returns:
      [b@data, s@tensor, d] for `"tokens"`, [b@data, s, d@tensor] for `"features"`.

    Raises:
      ValueError: if layouts or dtypes differ; else as `dense.row_parallel`.
    """
    layout, dtype = layout_of(modules), compute_dtype(xs, *modules)
    kernels, biases = zip(*(parameters_of(module, dtype) for module in modules), strict=True)
    return dense.row_parallel([x.astype(dtype) for x in xs], kernels, sum_of(biases), layout=layout)


def _sizes(features: int | Sequence[int]) -> tuple[int, ...]:
    return (features,) if isinstance(features, int) else tuple(features)


def layout_of(modules: Sequence[_Linear]) -> Layout | None:
    """The one layout of the modules of a call."""
    layouts = {module.layout for module in modules}
    if len(layouts) != 1:
        raise ValueError(
            f"{len(modules)} modules of one collective have {len(layouts)} layouts: {layouts}; "
            "give them the same one"
        )
    return layouts.pop()


def compute_dtype(x: Any, *modules: _Linear) -> jnp.dtype:
    """What the operands of one call are cast to."""
    dtypes = {None if module.dtype is None else jnp.dtype(module.dtype) for module in modules}
    if len(dtypes) != 1:
        raise ValueError(f"modules of one collective have the dtypes {dtypes}; give them the same")
    (dtype,) = dtypes
    if dtype is None:
        return jnp.result_type(*jax.tree.leaves(x), *(module.kernel.dtype for module in modules))
    return dtype


def sum_of(biases: Sequence[jax.Array | None]) -> jax.Array | None:
    """What is added to a sum of products, or None."""
    present = [bias for bias in biases if bias is not None]
    return sum(present[1:], present[0]) if present else None


def parameters_of(module: _Linear, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """Kernel and bias, cast."""
    bias = None if module.bias is None else module.bias[...].astype(dtype)
    return module.kernel[...].astype(dtype), bias

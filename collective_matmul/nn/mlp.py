"""The two-layer perceptron between two collectives, plain or gated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer

from collective_matmul import dense
from collective_matmul.layout import Layout
from collective_matmul.nn.linear import (
    ColumnParallel,
    RowParallel,
    compute_dtype,
    default_bias_init,
    default_kernel_init,
    layout_of,
    parameters_of,
)


class MLP(nnx.Module):
    """`y = down(activation(up(x)))`, or gated `y = down(activation(gate(x)) * up(x))`: `dense.mlp`.

    `up`, `gate` and `down` are layers of their own, so that a parallel block can run them together
    with those of its attention.

    Args:
      features: d, of x and y.
      hidden_features: f.
      activation: elementwise.
      gated: whether there is a gate.
      layout: where arrays lie, or None for one device.
      use_bias: whether the layers have biases.
      dtype: what x and the parameters are cast to before anything travels; None: their common one.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.
      rngs: where the initialisers' keys come from, the stream `params`.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu,
        gated: bool = False,
        layout: Layout | None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        rngs: nnx.Rngs,
    ) -> None:
        common: dict[str, Any] = {
            "layout": layout,
            "use_bias": use_bias,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "kernel_init": kernel_init,
            "bias_init": bias_init,
            "rngs": rngs,
        }
        self.activation = activation
        self.up = ColumnParallel(features, hidden_features, **common)
        self.gate = ColumnParallel(features, hidden_features, **common) if gated else None
        self.down = RowParallel(hidden_features, features, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From and to `[b@data, s@tensor, d]` or `[b@data, s, d@tensor]`."""
        into = [self.up] if self.gate is None else [self.gate, self.up]
        layout = layout_of([*into, self.down])
        dtype = compute_dtype(x, *into, self.down)
        kernels, biases = zip(*(parameters_of(layer, dtype) for layer in into), strict=True)
        kernel_out, bias_out = parameters_of(self.down, dtype)
        return dense.mlp(
            x.astype(dtype),
            kernels,
            kernel_out,
            biases,
            bias_out,
            activation=self.activation,
            layout=layout,
        )

"""Layer norms with and without centring, computed in float32."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx


class Norm(nnx.Module):
    """`y = (x - c) / sqrt(mean((x - c)^2) + epsilon) * scale + bias`, over the last dimension.

    Args:
      kind: "ln" with c = mean(x), or "rms" with c = 0.
      features: size of the last dimension.
      use_bias: whether there is a bias.
      epsilon: as above.

    Reference: Ba et al. 2016 (arXiv 1607.06450); Zhang and Sennrich 2019 (1910.07467).
    """

    def __init__(
        self, kind: Literal["ln", "rms"], features: int, *, use_bias: bool, epsilon: float
    ) -> None:
        if kind not in ("ln", "rms"):
            raise ValueError(f"a norm of kind {kind!r} is neither 'ln' nor 'rms'")
        self.centred = kind == "ln"
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.data(nnx.Param(jnp.zeros((features,), jnp.float32)) if use_bias else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From and to `[..., features]`, in the dtype of x."""
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        lead = (1,) * (x.ndim - 1)
        y = y * self.scale[...].reshape(*lead, -1)
        if self.bias is not None:
            y = y + self.bias[...].reshape(*lead, -1)
        return y.astype(x.dtype)

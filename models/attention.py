"""Multi-head attention: collective matmuls around an attention that stays on its device.

Heads are cut over the tensor axis. Each device has its heads whole, so nothing travels between the
gather that makes queries, keys and values and the scatter that takes the heads' outputs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from collective_matmul import Layout, nn
from models.attend import attend, kernel_for
from models.attend.pallas_tpu import Kernel
from models.capture import Capture
from models.norm import Norm
from models.vit_config import Config, Style

kernel_init = nnx.initializers.xavier_uniform()

PRODUCT = "product"
"""The name under which `jax.checkpoint` finds the results of the collectives."""


def gathered(x: jax.Array, *modules: nn.ColumnParallel) -> tuple[jax.Array, ...]:
    """`nn.column`, its results named for `jax.checkpoint`."""
    return tuple(checkpoint_name(y, PRODUCT) for y in nn.column(x, *modules))


class Attention(nnx.Module):
    """`out(softmax(N(query(x)) . N(key(y)) / sqrt(head_dim)) . value(y))`, parameters as in flax.

    Args:
      config: sizes.
      style: which norm N, if any, and which biases.
      layout: where y lies, or None for one device.
      query_layout: where x and the result lie.
      rngs: keys of the initialisers.
    """

    def __init__(
        self,
        config: Config,
        style: Style,
        *,
        layout: Layout | None,
        query_layout: Layout | None,
        rngs: nnx.Rngs,
    ) -> None:
        d, heads, head_dim = config.width, config.heads, config.head_dim
        common: dict[str, Any] = {
            "dtype": jnp.dtype(config.dtype),
            "kernel_init": kernel_init,
            "rngs": rngs,
        }
        into = common | {"use_bias": style.qkv_bias}
        self.query = nn.ColumnParallel(d, (heads, head_dim), layout=query_layout, **into)
        self.key = nn.ColumnParallel(d, (heads, head_dim), layout=layout, **into)
        self.value = nn.ColumnParallel(d, (heads, head_dim), layout=layout, **into)
        self.out = nn.RowParallel(
            (heads, head_dim), d, layout=query_layout, use_bias=style.out_bias, **common
        )
        norms = [
            Norm(style.qk_norm, head_dim, use_bias=False, epsilon=config.epsilon)
            if style.qk_norm
            else None
            for _ in range(2)
        ]
        self.query_norm, self.key_norm = map(nnx.data, norms)
        self.choice = config.attention

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, capture: Capture
    ) -> jax.Array:
        """What `models.attend` makes of the projections, as the config chooses.

        Args:
          query: [b@data, q, heads@tensor, head_dim], or [1, q, ...], the same for all rows.
          key, value: [b@data, s, heads@tensor, head_dim].
          capture: notes what `models.attend` names.

        Returns:
          [b@data, q, heads@tensor, head_dim], for `out`.
        """
        return attend(
            query,
            key,
            value,
            self.norms,
            choice=self.choice,
            layout=self.out.layout,
            capture=capture,
        )

    @property
    def norms(self) -> tuple[Norm, Norm] | None:
        """Of queries and keys."""
        if self.query_norm is None or self.key_norm is None:
            return None
        return self.query_norm, self.key_norm

    def kernel_for(self, query: Any, key: Any, capture: Capture) -> Kernel | None:
        """The kernel that `attend` would run on arrays of these shapes, or None."""
        return kernel_for(
            query, key, self.norms, choice=self.choice, layout=self.out.layout, capture=capture
        )

    def __call__(self, x: jax.Array, capture: Capture) -> jax.Array:
        """Self-attention, from and to `[b@data, s@tensor, d]` or `[b@data, s, d@tensor]`."""
        query, key, value = gathered(x, self.query, self.key, self.value)
        return self.out(self.attend(query, key, value, capture))

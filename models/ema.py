"""An average of the parameters over the steps, which often classifies better than the last ones.

    a_0 = p_0;  a_n = d a_{n-1} + (1 - d) p_n,  d = min(decay, (1 + n) / (10 + n))

The smaller d of the first updates lets the average forget the initial parameters; without it they
are a third of it after 10,000 steps of decay 0.9999.

Reference: Polyak and Juditsky 1992; the growing d is that of TensorFlow's
`tf.train.ExponentialMovingAverage(num_updates=...)`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def begin(decay: float | None, params: Any) -> Any:
    """The average before the first step: a copy of the parameters, or None for no average."""
    return None if decay is None else jax.tree.map(jnp.copy, params)


def update(decay: float | None, average: Any, params: Any, updates: jax.Array) -> Any:
    """The average after an update.

    Args:
      decay: the largest d, or None for no average.
      average: before it, as `begin` makes it.
      params: after it, a tree of the same shapes.
      updates: how many were made, this one among them: n, an int32 scalar.
    """
    if decay is None:
        return None
    n = updates.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + n) / (10.0 + n))
    return jax.tree.map(lambda a, p: a + (1.0 - d).astype(a.dtype) * (p - a), average, params)

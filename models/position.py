"""Learned position embeddings at resolutions that they were not learned for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def resample(table: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Bilinear interpolation of a grid of vectors, corners on corners.

    Args:
      table: [1, rows * columns, d], for the grid `old`, row by row.
      old: rows and columns of the table.
      new: rows and columns wanted.

    Returns:
      [1, rows * columns, d] for the grid `new`.

    Reference: big_vision resamples the same way (`scipy.ndimage.zoom` of order 1).
    """
    down, across = (
        jnp.asarray(_weights(size, count), table.dtype)
        for size, count in zip(old, new, strict=True)
    )
    grid = table.reshape(*old, -1)
    result = jnp.einsum("ya,xb,abd->yxd", down, across, grid, precision="highest")
    return result.reshape(1, new[0] * new[1], -1)


def _weights(size: int, count: int) -> np.ndarray:
    """[count, size]: how much each of `size` points counts at each of `count` between the ends."""
    at = np.linspace(0.0, size - 1, count)
    return np.clip(1.0 - np.abs(at[:, None] - np.arange(size)), 0.0, None)

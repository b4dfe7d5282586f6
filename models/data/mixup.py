"""MixUp: each row is blended with the row before it, images and labels with the same weight.

    x'_r = w x_r + (1 - w) x_{r-1},    y'_r = w y_r + (1 - w) y_{r-1},    w = max(v, 1 - v),
    v ~ beta(alpha, alpha)

The partner is a neighbour, so that a process which makes some rows of a batch makes at most one
more for each run of them. Reference: H. Zhang et al., arXiv 1710.09412, eq. 1.
"""

from __future__ import annotations

import numpy as np

from models.data.config import Data
from models.data.images import MIXES


def partners(rows: np.ndarray, batch: int) -> np.ndarray:
    """The row that each row is blended with: [rows]."""
    return (rows - 1) % batch


def weights(config: Data, batch: int, *, seed: int, step: int) -> np.ndarray:
    """How much of each row of the whole batch is its own: [batch] float32, from 0.5 to 1."""
    random = np.random.default_rng((MIXES, seed, step))
    size = batch if config.mixup_per == "row" else 1
    own = random.beta(config.mixup, config.mixup, size=size)
    return np.broadcast_to(np.maximum(own, 1 - own).astype(np.float32), (batch,))


def blend(own: np.ndarray, other: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`weight * own + (1 - weight) * other`, for own, other: [rows, ...] and weight: [rows]."""
    weight = weight.reshape(-1, *(1,) * (own.ndim - 1))
    return weight * own + (1 - weight) * other

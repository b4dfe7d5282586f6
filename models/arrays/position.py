"""Position embeddings of a file: of another grid, or without a row for the class token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from models.arrays.format import Format
from models.arrays.reading import Stored
from models.position import resample as interpolate
from models.vit_config import Config

Grid = tuple[int, int]


def fitted(
    form: Format,
    config: Config,
    arrays: Mapping[str, Stored],
    resample: bool | Grid,
    shape: tuple[int, ...],
) -> tuple[Mapping[str, Stored], Callable[[], np.ndarray] | None]:
    """The file's arrays, the position embeddings of them described as they will fit.

    Args:
      form: of the file.
      config: the model.
      arrays: of the file, by canonical name.
      resample: whether to interpolate from another grid, or the rows and columns of that grid.
      shape: of the model's position embeddings.

    Returns:
      The arrays, and what makes the position embeddings; None where they are taken as they are.
    """
    stored = arrays.get(form.position)
    if stored is None or stored.shape[-1] != shape[-1]:
        return arrays, None
    rows, tokens = math.prod(stored.shape[:-1]), math.prod(config.grid)
    has_cls = config.pool == "cls"
    if rows == has_cls + tokens and stored.shape == shape:
        return arrays, None
    old: Grid | None = None
    if rows not in (tokens, has_cls + tokens):
        old = _grid(rows, has_cls, resample)
        if old is None:
            return arrays, None

    def make() -> np.ndarray:
        table = np.array(stored.read(), np.float32).reshape(1, rows, -1)
        of_cls = rows - (math.prod(old) if old else tokens)
        fixed = table[:, :of_cls] if of_cls else np.zeros((1, int(has_cls), shape[-1]), np.float32)
        learned = table[:, of_cls:]
        if old is not None:
            learned = np.asarray(interpolate(jnp.asarray(learned), old, config.grid))
        return np.concatenate([fixed, learned], axis=1)

    return {**arrays, form.position: dataclasses.replace(stored, shape=shape)}, make


def _grid(rows: int, has_cls: bool, resample: bool | Grid) -> Grid | None:
    """The grid of a file's embeddings, if it is to be resampled and can be told."""
    if isinstance(resample, tuple):
        return resample if rows - math.prod(resample) in (0, int(has_cls)) else None
    for tokens in (rows, rows - 1) if has_cls else (rows,):
        side = math.isqrt(tokens)
        if resample and side * side == tokens:
            return side, side
    return None

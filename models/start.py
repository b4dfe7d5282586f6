"""Weights to begin a run with: fine-tuning, also at another resolution."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from models import formats, vit


@dataclasses.dataclass(frozen=True)
class Start:
    """Where the first parameters come from."""

    path: pathlib.Path | None = None
    """weights in any of models/formats; position embeddings of another, square grid are resampled;
    None: parameters are drawn from the seed"""
    head: bool = False
    """whether the classifier is taken from there too; else it begins anew"""


def params(start: Start, model: vit.Config, like: Any) -> Any:
    """The parameters of a file, each where it belongs.

    Args:
      start: which file.
      model: what they are for.
      like: the tree to fill, of `jax.ShapeDtypeStruct`s with their places.

    Raises:
      FileNotFoundError, ValueError: as `formats.load`.
    """
    assert start.path is not None
    loaded = formats.load(start.path, model, like, head=start.head, resample=True)
    return jax.tree.map(jnp.asarray, loaded)

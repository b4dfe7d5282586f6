"""Parameters laid out as a format's files have them, each array made when it is written."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from models.arrays import checking
from models.arrays.format import BLOCKS, Entry, Format
from models.arrays.tree import abstract, names
from models.arrays.writing import Pending, on_host
from models.vit_config import Config


def pending(params: Any, config: Config, form: Format) -> list[Pending]:
    """What a file of the format is to have.

    Args:
      params: nested dictionaries of arrays, on any mesh.
      config: the model.
      form: the format.

    Raises:
      ValueError: if the parameters are not those of the config.
    """
    arrays = dict(zip(names(params), jax.tree.leaves(params), strict=True))
    _check(arrays, config)
    made = []
    for entry in form.entries(config, {name: x.shape for name, x in arrays.items()}):
        shape, dtype = checking.expected(form, config, entry, arrays)
        if entry.name == form.position:
            shape = shape[-form.position_rank :]
        chunks = functools.partial(_chunks, entry, shape, arrays, config, form)
        made.append(Pending(form.in_file(config, entry.name), shape, dtype, chunks))
    return made


def _chunks(
    entry: Entry, shape: tuple[int, ...], arrays: dict[str, Any], config: Config, form: Format
) -> Iterator[np.ndarray]:
    """An array of a file; one that has all layers, layer by layer."""
    first = arrays[entry.ours[0]]
    if entry.layer is None and entry.ours[0].startswith(BLOCKS):
        for layer in range(first.shape[0]):
            yield on_host(first, layer)
        return
    parts = [
        form.arrangement.there(name, on_host(arrays[name], entry.layer), config)
        for name in entry.ours
    ]
    yield np.concatenate(parts, entry.axis).reshape(shape)


def _check(arrays: dict[str, Any], config: Config) -> None:
    tree = abstract(config, None)
    wanted = dict(zip(names(tree), jax.tree.leaves(tree), strict=True))
    if different := sorted(arrays.keys() ^ wanted.keys()):
        raise ValueError(f"{different[0]} is not in both, the parameters and the config's model")
    for name, x in arrays.items():
        if x.shape != wanted[name].shape:
            raise ValueError(f"{name} has the shape {x.shape}, the config's {wanted[name].shape}")

"""Parameters as safetensors: flat names, and the arrays of ordinary Dense layers, cut nowhere."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models.files import atomically


def names(params: Any) -> list[str]:
    """The name of every array, `"blocks.up.kernel"`, in the order of `jax.tree.leaves`."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def save(params: Any, path: pathlib.Path) -> None:
    """Writes all parameters. Every process calls this; the first one writes.

    Args:
      params: nested dictionaries of arrays, on any mesh.
      path: the file to make or replace, as a whole.
    """
    arrays = {
        name: _whole(x) for name, x in zip(names(params), jax.tree.leaves(params), strict=True)
    }
    if jax.process_index() == 0:
        with atomically(path) as draft:
            safetensors.numpy.save_file(arrays, draft)


def load(path: pathlib.Path, like: Any) -> Any:
    """Reads parameters that `save` wrote, or anyone else with the same names.

    Args:
      path: the file.
      like: the tree to fill: arrays, or `jax.ShapeDtypeStruct`.

    Returns:
      A tree as `like`, of numpy arrays.

    Raises:
      ValueError: if names, shapes or dtypes differ, with the first that do.
    """
    found = safetensors.numpy.load_file(path)
    wanted = dict(zip(names(like), jax.tree.leaves(like), strict=True))
    if different := sorted(found.keys() ^ wanted.keys()):
        where = "is missing" if different[0] in wanted else "has no place in the model"
        raise ValueError(f"{path}: {different[0]} {where}, and {len(different) - 1} more differ")
    for name, x in wanted.items():
        if (found[name].shape, found[name].dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"{path}: {name} is {found[name].dtype}{found[name].shape}, and the model has "
                f"{x.dtype}{x.shape}"
            )
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])


def _whole(x: jax.Array) -> np.ndarray:
    """On this host in full, wherever its pieces lie."""
    if not x.is_fully_addressable:
        everywhere = NamedSharding(x.sharding.mesh, P())  # type: ignore[attr-defined]
        x = jax.jit(lambda x: x, out_shardings=everywhere)(x)
    return np.asarray(x)

"""Arrays to files and back, each process its own shards: what orbax does for us.

All arrays of a checkpoint are one OCDBT database, one file of values per process, however many
arrays and shards there are. Nothing is compressed: random mantissas shrink by less than a tenth.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import pathlib
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

T = TypeVar("T")

# What goes wrong in orbax's threads it raises, and logs with pages of text. It is said once, in a
# line, by whoever waits for the threads.
logging.getLogger("absl").addFilter(lambda record: "orbax/checkpoint" not in record.pathname)
logging.getLogger("asyncio").addFilter(lambda record: "orbax/checkpoint" not in record.getMessage())


def names(tree: Any) -> list[str]:
    """The name of every array, `"moments.1.mu.head.kernel"`, in the order of `jax.tree.leaves`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def named(tree: Any) -> dict[str, Any]:
    """{name: array} of a tree."""
    return dict(zip(names(tree), jax.tree.leaves(tree), strict=True))


def start(folder: pathlib.Path, arrays: Mapping[str, jax.Array]) -> list[ocp.Future]:
    """Begins to write arrays. They may be changed or given away as soon as this returns.

    Args:
      folder: an empty folder, the same for all processes.
      arrays: {name: array}.

    Returns:
      What to wait for, by `.result(timeout=seconds)`.
    """
    saving = _handler().async_save(epath.Path(folder), args=ocp.args.PyTreeSave(dict(arrays)))
    return _run(saving) or []


def finish(folder: pathlib.Path) -> None:
    """Makes one database of what the processes wrote. The first process calls this alone."""
    _handler().finalize(epath.Path(folder))


def read(folder: pathlib.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads arrays to where they belong: each process what its devices hold.

    Args:
      folder: where they were written.
      wanted: {name: shape, dtype and sharding}. Without a sharding an array goes to one device.
    """
    there = SingleDeviceSharding(jax.local_devices()[0])
    how = {
        name: ocp.ArrayRestoreArgs(
            sharding=x.sharding or there, global_shape=x.shape, dtype=x.dtype, strict=True
        )
        for name, x in wanted.items()
    }
    what = ocp.args.PyTreeRestore(dict(wanted), restore_args=how, partial_restore=True)
    return dict(_handler().restore(epath.Path(folder), args=what))


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """In a thread of its own: a notebook has an event loop running in this one."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()

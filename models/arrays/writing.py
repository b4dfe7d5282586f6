"""Safetensors and npz files, written array after array, so that no host holds a model whole."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models.arrays.reading import DTYPES
from models.files import atomically


@dataclasses.dataclass(frozen=True)
class Pending:
    """An array to write.

    Args:
      name: in the file.
      shape, dtype: of the array.
      chunks: makes the array, in pieces along its first dimension.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Callable[[], Iterable[np.ndarray]]


def write(path: pathlib.Path, arrays: Sequence[Pending], metadata: Mapping[str, str]) -> None:
    """Makes or replaces a file, as a whole. Every process calls this; the first one writes.

    Args:
      path: the file; its suffix, .safetensors or .npz, says which kind.
      arrays: what goes into it.
      metadata: words to carry along in safetensors.
    """
    if jax.process_index():  # making the chunks is the work of all
        for array in arrays:
            for _ in array.chunks():
                pass
        return
    with atomically(path) as draft:
        if path.suffix == ".npz":
            _npz(draft, arrays)
        else:
            _safetensors(draft, arrays, metadata)


def _safetensors(
    path: pathlib.Path, arrays: Sequence[Pending], metadata: Mapping[str, str]
) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for array in arrays:
        begin, end = end, end + int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize
        header[array.name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            for chunk in array.chunks():
                file.write(chunk.tobytes())


def _npz(path: pathlib.Path, arrays: Sequence[Pending]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for array in arrays:
            member = zipfile.ZipInfo(f"{array.name}.npy")  # of no time: same arrays, same file
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.concatenate([*array.chunks()]))


def on_host(x: Any, layer: int | None = None) -> np.ndarray:
    """An array, or one layer of it, on this host, wherever its pieces lie.

    Args:
      x: numpy's, or jax's on any mesh. Of several processes all have to call this.
      layer: a place along the first dimension; None: all.
    """
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        everywhere = NamedSharding(x.sharding.mesh, P())  # type: ignore[attr-defined]
        if layer is None:
            return np.asarray(_gathering(everywhere)(x))
        return np.asarray(_gathering_a_layer(everywhere)(x, layer))
    whole = np.asarray(x)
    return whole if layer is None else whole[layer]


@functools.cache
def _gathering(place: NamedSharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda x: x, out_shardings=place)


@functools.cache
def _gathering_a_layer(place: NamedSharding) -> Callable[..., jax.Array]:
    return jax.jit(
        lambda x, layer: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False),
        out_shardings=place,
    )

"""Arrays of safetensors and npz files by name, none of them read before it is asked for."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import safetensors

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""What safetensors calls the dtypes."""

INDEX = "model.safetensors.index.json"
"""Which array is in which file, where transformers splits one model over several."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of a file.

    Args:
      shape, dtype: of the array.
      read: gives the array: of safetensors a view of the mapped file, of npz a copy.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """What a file, or a folder of a model, has.

    Args:
      path: the file that names the arrays.
      arrays: the arrays by name.
      metadata: words that the file carries beside them.
    """

    path: pathlib.Path
    arrays: Mapping[str, Stored]
    metadata: Mapping[str, str]


def open_file(path: pathlib.Path) -> Source:
    """The arrays of a file; of a folder, those of the one model in it.

    Args:
      path: a .safetensors or .npz file, an index of several, or the folder that transformers makes.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is none of these, or is damaged.
    """
    path = _file_of(path)
    try:
        if path.name.endswith(".index.json"):
            files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            parts = {name: _safetensors(path.with_name(name)) for name in set(files.values())}
            return Source(path, {n: parts[f].arrays[n] for n, f in files.items()}, {})
        with path.open("rb") as file:
            start = file.read(9)
        if zipfile.is_zipfile(path) and path.suffix == ".npz":
            return _npz(path)
        if start[8:] == b"{":
            return _safetensors(path)
    except (safetensors.SafetensorError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy or save it again") from error
    raise ValueError(
        f"{path} is neither a safetensors nor a whole npz file; one of torch.save (.bin, .pth) has "
        "to be saved again by safetensors.torch.save_file"
    )


def _file_of(path: pathlib.Path) -> pathlib.Path:
    """The file to open, of a file or of a folder."""
    if not path.is_dir():
        return path
    found = sorted(p for kind in ("*.safetensors", "*.npz") for p in path.glob(kind))
    for name in (INDEX, "model.safetensors"):
        if (path / name).exists():
            return path / name
    if len(found) != 1:
        names = [p.name for p in found]
        raise ValueError(f"{path} has {len(found)} files of weights, {names}: name one of them")
    return found[0]


def _safetensors(path: pathlib.Path) -> Source:
    with safetensors.safe_open(path, "np") as file:  # checks that the file is whole
        metadata = file.metadata() or {}
    with path.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(size))
    header.pop("__metadata__", None)
    mapped = np.memmap(path, np.uint8, mode="r")

    def stored(name: str, entry: dict) -> Stored:
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is of the dtype {entry['dtype']}; save it as F32")
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        at = 8 + size + entry["data_offsets"][0]
        return Stored(shape, dtype, lambda: np.ndarray(shape, dtype, mapped, at))

    return Source(path, {name: stored(name, entry) for name, entry in header.items()}, metadata)


def _npz(path: pathlib.Path) -> Source:
    archive = zipfile.ZipFile(path)

    def stored(member: str) -> Stored:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = header(file)
        # numpy knows no bfloat16, and has saved what jax gave it as two bytes without a meaning.
        known = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype

        def read() -> np.ndarray:
            try:
                with archive.open(member) as file:
                    return np.lib.format.read_array(file, allow_pickle=False).view(known)
            except (zipfile.BadZipFile, ValueError) as error:
                raise ValueError(f"{path} is damaged ({error}): copy or save it again") from error

        return Stored(shape, known, read)

    members = [name for name in archive.namelist() if name.endswith(".npy")]
    return Source(path, {name.removesuffix(".npy"): stored(name) for name in members}, {})

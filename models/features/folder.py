"""A folder of features, written as they come: files of some thousand images, whole or not there.

    index.json                             what was asked for, and the names of all images in order
    features-00000-of-00012.safetensors    each activation by name, [images, ...], "label", "index"

An extraction that was interrupted goes on where files are missing, if it is asked for the same.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from models.files import atomically

INDEX = "index.json"


class Folder:
    """The files of one extraction.

    Args:
      path: the folder; it is made.
      plan: what decides the features, as JSON: model, weights, images, layers, sizes.
      names: of all images, in order.
      batches: how many batches there are.
      each: how many of them one file holds.

    Raises:
      ValueError: if the folder holds the features of another plan.
    """

    def __init__(
        self,
        path: pathlib.Path,
        plan: Mapping[str, Any],
        names: Sequence[str],
        *,
        batches: int,
        each: int,
    ) -> None:
        self.path, self.batches, self.each = path, batches, each
        self.count = -(-batches // each)
        plan = json.loads(json.dumps(plan, default=str)) | {
            "processes": jax.process_count(),
            "files": self.count,
        }
        self.digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
        if (path / INDEX).exists():
            _check(path, json.loads((path / INDEX).read_text(encoding="utf-8"))["plan"], plan)
        elif not jax.process_index():
            with atomically(path / INDEX) as draft:
                draft.write_text(json.dumps({"plan": plan, "names": list(names)}, indent=1) + "\n")

    def missing(self) -> list[tuple[int, int]]:
        """The runs of files that are not there: (first, end). All processes get the same."""
        here = range(jax.process_count())
        lacking = [not all(self._whole(i, p) for p in here) for i in range(self.count)]
        if jax.process_count() > 1:  # a quick process may have begun to write already
            lacking = np.asarray(
                multihost_utils.broadcast_one_to_all(np.array(lacking, np.int32))
            ).tolist()
        edges = np.flatnonzero(np.diff([0, *map(int, lacking), 0])).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))

    def span(self, first: int, end: int) -> tuple[int, int]:
        """The batches of files: (start, stop)."""
        return first * self.each, min(end * self.each, self.batches)

    def write(self, number: int, parts: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Makes this process' file of a number, of the arrays of its batches."""
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        with atomically(self._file(number, jax.process_index())) as draft:
            draft.write_bytes(safetensors.numpy.save(whole, {"plan": self.digest}))

    def _file(self, number: int, process: int) -> pathlib.Path:
        several = f".{process}" if jax.process_count() > 1 else ""
        return self.path / f"features-{number:05}-of-{self.count:05}{several}.safetensors"

    def _whole(self, number: int, process: int) -> bool:
        path = self._file(number, process)
        try:
            with safetensors.safe_open(path, "np") as file:
                return (file.metadata() or {}).get("plan") == self.digest
        except (FileNotFoundError, safetensors.SafetensorError):
            return False


def read(path: pathlib.Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """All features of a folder, in the order of the images.

    Args:
      path: the folder.

    Returns:
      The images' names, and the arrays by name: each activation, "label" and "index".

    Raises:
      FileNotFoundError: if nothing was written there.
      ValueError: if files are missing: the extraction was interrupted.
    """
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    files = sorted(path.glob("features-*-of-*.safetensors"))
    wanted = index["plan"]["files"] * index["plan"]["processes"]
    if len(files) != wanted:
        raise ValueError(
            f"{path} has {len(files)} of {wanted} files: run the same command again to go on"
        )
    parts = [safetensors.numpy.load_file(file) for file in files]
    order = np.argsort(np.concatenate([part["index"] for part in parts]), kind="stable")
    arrays = {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}
    return [index["names"][number] for number in arrays["index"].tolist()], arrays


def _check(path: pathlib.Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    was, now = _flat(old), _flat(new)
    for name in (*now, *was):
        if was.get(name) != now.get(name):
            raise ValueError(
                f"{path} has the features of another extraction: {name} was {was.get(name)}, and "
                f"is {now.get(name)}; choose another folder, or delete this one"
            )


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    """`{"model.width": 64, ...}` of nested dictionaries."""
    found: dict[str, Any] = {}
    for name, value in plan.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": x for inner, x in _flat(value).items()}
        else:
            found[name] = value
    return found

"""Restoring one checkpoint: either all of it is as it was saved, or it is said what is not.

The order is from cheap to dear: the manifest, the files' sizes, the reading, the values' sums.
After each of them the processes compare what they found, so that all give up together.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models.checkpoint import agree, arrays, files, manifest, sums
from models.checkpoint.damage import Damage
from models.checkpoint.manifest import Manifest, Unreadable


@dataclasses.dataclass(frozen=True)
class Found:
    """A good checkpoint; see `folder.Restored`."""

    state: Any
    extra: dict[str, Any]
    filled: tuple[str, ...]
    dropped: tuple[str, ...]


def restore(
    path: pathlib.Path,
    step: int,
    like: Any,
    identity: Mapping[str, Any],
    optional: Mapping[str, Any],
) -> Found | list[Damage]:
    """The state that a checkpoint holds, or what is wrong with it; see `Folder.restore`.

    Args:
      path, step: the checkpoint.
      like: a tree of `jax.ShapeDtypeStruct` with shardings.
      identity: of this run.
      optional: fields that may be absent on either side.

    Raises:
      Mismatch: if it is another run's.
    """
    about, damages = _opened(path, step)
    if about is None or damages:
        return damages
    wanted = arrays.named(like)
    filled, dropped = _fields(about, wanted, optional)
    read = {name: x for name, x in wanted.items() if _field(name) not in filled}
    kept = {name: x for name, x in about.arrays.items() if _field(name) not in dropped}
    about = dataclasses.replace(about, arrays=kept)
    manifest.compare(about, read, identity, path)

    values: dict[str, jax.Array] = {}
    error = ""
    try:
        values = arrays.read(path, read)
    except Exception as problem:  # TensorStore and orbax raise many kinds, with pages of text
        error = type(problem).__name__
    if any(errors := agree.exchange(error)):
        return _blamed(path, about, step, tuple(read), f"cannot be read ({max(errors)})")
    found = sums.texts(values, sums.sums(values))
    wrong = [name for name in found if found[name] != about.arrays[name]["sum"]]
    if wrong:
        return _blamed(path, about, step, wrong, "not the values that were saved")
    values |= _fill(filled, like, values, optional)
    ordered = [values[name] for name in wanted]
    state = jax.tree.unflatten(jax.tree.structure(like), ordered)
    return Found(state, about.extra, tuple(filled), tuple(dropped))


def _opened(path: pathlib.Path, step: int) -> tuple[Manifest | None, list[Damage]]:
    """The manifest, and what is wrong before any array is read; the same in all processes."""
    about = None
    seen: list[tuple[str, str, tuple[str, ...]]] = []
    try:
        about = manifest.read(path)
        if jax.process_index() == 0:
            wrong = files.wrong(path, about.files)
            seen = [(what, name, about.files[name].holds) for name, what in wrong.items()]
    except Unreadable as problem:
        seen = [(str(problem), manifest.NAME, ())]
    seen = next((found for found in agree.exchange(seen) if found), [])
    return about, [Damage(step, what, file, tuple(holds)) for what, file, holds in seen]


def _blamed(
    path: pathlib.Path, about: Manifest, step: int, names: Sequence[str], what: str
) -> list[Damage]:
    """The files that have changed, of those that hold these arrays; each process reads a share."""
    holding = [file for file, x in about.files.items() if not x.holds or set(x.holds) & set(names)]
    share = holding[jax.process_index() :: jax.process_count()]
    changed: dict[str, str] = {}
    for part in agree.exchange(files.changed(path, {name: about.files[name] for name in share})):
        changed |= part
    if not changed:
        what = (
            f"{what}, though no file has changed: the disk, the network or the memory gave others"
        )
        return [Damage(step, what, None, tuple(names))]
    return [
        Damage(step, problem, file, tuple(n for n in about.files[file].holds if n in set(names)))
        for file, problem in changed.items()
    ]


def _field(name: str) -> str:
    return name.partition(".")[0]


def _fields(
    about: Manifest, wanted: Mapping[str, Any], optional: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Of the optional fields: those that the checkpoint lacks, and those that it has in vain."""
    saved, here = {_field(name) for name in about.arrays}, {_field(name) for name in wanted}
    filled = [name for name in optional if name in here and name not in saved]
    dropped = [name for name in optional if name in saved and name not in here]
    return filled, dropped


def _fill(
    filled: Sequence[str], like: Any, values: Mapping[str, jax.Array], optional: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """The arrays of fields that the checkpoint does not have: {name: array}."""
    found: dict[str, jax.Array] = {}
    for field in filled:
        described = {n: x for n, x in arrays.named(like).items() if _field(n) == field}
        source = optional[field]
        if isinstance(source, str):
            there = {field + n[len(source) :]: x for n, x in values.items() if _field(n) == source}
        else:
            there = {f"{field}.{n}" if n else field: x for n, x in arrays.named(source).items()}
        if there.keys() != described.keys():
            raise ValueError(
                f"{field} cannot be filled: what should fill it has other arrays, "
                f"{min(there.keys() ^ described.keys())} first"
            )
        found |= _copied(there, described)
    return found


def _copied(values: Mapping[str, jax.Array], like: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Arrays of their own, with the dtypes and the places of `like`."""

    def copy(tree: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: jnp.array(x, like[name].dtype, copy=True) for name, x in tree.items()}

    places = {name: x.sharding for name, x in like.items()}
    return jax.jit(copy, out_shardings=None if None in places.values() else places)(values)

"""Arrays of a file into the places of a model: one parameter after another, and shard by shard."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from models.arrays import checking
from models.arrays.format import Entry, Format
from models.arrays.position import fitted
from models.arrays.reading import Source, Stored
from models.arrays.tree import names
from models.vit_config import Config

Index = tuple[slice, ...]
Reader = Callable[[Index], np.ndarray]


def fit(
    source: Source,
    kind: str,
    form: Format,
    config: Config,
    like: Any,
    *,
    head: bool,
    resample: bool | tuple[int, int],
) -> Any:
    """A tree as `like` with the values of a file; see `models.formats.load`."""
    leaves = dict(zip(names(like), jax.tree.leaves(like), strict=True))
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    own = form.canonical(source.arrays)
    entries = _stacked(form, form.entries(config, shapes), own)
    arrays = {name: source.arrays[theirs] for name, theirs in own.items()}
    if not head:
        entries = [e for e in entries if not e.ours[0].startswith("head.")]
        arrays = {n: x for n, x in arrays.items() if not n.startswith(form.heads)}
    found, position = fitted(form, config, arrays, resample, leaves["position"].shape)
    checking.check(f"{source.path} as {kind}", form, config, entries, leaves, found)
    parts = _parts(entries)

    def reader(name: str) -> Reader:
        leaf = leaves[name]
        if name == "position" and position is not None:
            whole = position()
            return lambda index: whole[index]
        if name not in parts:
            start = config.head_bias if name.endswith(".bias") else 0.0
            return lambda index: np.full(leaf.shape, start, leaf.dtype)[index]
        return _reader(name, leaf, parts[name], form, config, shapes, found)

    values = [_placed(leaf, reader(name)) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _stacked(form: Format, entries: list[Entry], own: Mapping[str, str]) -> list[Entry]:
    """The table of a file that has all layers in one array, if this is one."""
    if form.stacked is None or not any(name.startswith(form.stacked[1]) for name in own):
        return entries
    apart, together = form.stacked
    return [
        dataclasses.replace(e, name=e.name.replace(f"{apart}0/", together), layer=None)
        for e in entries
        if not e.layer
    ]


def _parts(entries: list[Entry]) -> dict[str, list[tuple[Entry, int]]]:
    """For every parameter of ours the entries that it lies in, and its number there."""
    parts: dict[str, list[tuple[Entry, int]]] = {}
    for entry in entries:
        for number, ours in enumerate(entry.ours):
            parts.setdefault(ours, []).append((entry, number))
    return parts


def _reader(
    name: str,
    leaf: Any,
    parts: list[tuple[Entry, int]],
    form: Format,
    config: Config,
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Stored],
) -> Reader:
    """What reads any part of one parameter."""
    views = []
    for entry, number in parts:
        inner = [shapes[n] if entry.layer is None else shapes[n][1:] for n in entry.ours]
        sizes = (
            [
                form.arrangement.shape(n, shape, config)[entry.axis]
                for n, shape in zip(entry.ours, inner, strict=True)
            ]
            if len(inner) > 1
            else []
        )
        whole = found[entry.name].read()
        part = np.split(whole, [*itertools.accumulate(sizes)][:-1], entry.axis)[number]
        views.append(form.arrangement.back(name, part, inner[number], config))
    if parts[0][0].layer is None:
        return lambda index: np.array(views[0][index], leaf.dtype)

    def stacked(index: Index) -> np.ndarray:
        first, *rest = index or (slice(None),)
        layers = [view[tuple(rest)] for view in views[first]]
        return np.stack(layers).astype(leaf.dtype, copy=False)

    return stacked


def _placed(leaf: Any, read: Reader) -> Any:
    """The array that `read` reads: numpy's, or where the leaf's sharding says, shard by shard."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return read((slice(None),) * len(leaf.shape))
    pieces: dict[tuple[Any, ...], np.ndarray] = {}

    def piece(index: Index | None) -> np.ndarray:
        index = index or ()
        key = tuple((cut.start, cut.stop) for cut in index)
        if key not in pieces:  # devices that hold the same piece share one reading of it
            pieces[key] = read(index)
        return pieces[key]

    return jax.make_array_from_callback(leaf.shape, sharding, piece)

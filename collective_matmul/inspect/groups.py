"""Which devices take part in a collective: the notations of HLO, read as numbers of partitions.

    {{0,1},{2,3}}                                       the groups themselves
    [2,2]<=[4], [2,2]<=[2,2]T(1,0)                      0, 1, 2, .. reshaped, transposed, reshaped
    mesh['data'=2,'tensor'=2] {'tensor'}                those that differ along these mesh axes only
    mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}   the same on a mesh of permuted devices
    {}                                                  all in one group

References:
  https://openxla.org/shardy/sharding_representation for axes that are split: `'a':(2)4` is a part
  of 4 of axis `a`, with 2 in the part before it.
"""

from __future__ import annotations

import functools
import math
import re

import numpy as np
import numpy.typing as npt

Groups = tuple[tuple[int, ...], ...]

_AXIS = re.compile(r"'([^']*)'=(\d+)")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_MEMBER = re.compile(r"'([^':]+)'?(?::\((\d+)\)(\d+))?'?")


@functools.cache
def groups(text: str, devices: int) -> Groups:
    """The groups of a collective.

    Args:
      text: the attribute `replica_groups`, with `device_ids` behind it where there is one.
      devices: of the whole program; what `{}` stands for.

    Raises:
      ValueError: the text is in no notation that this file knows.
    """
    text = text.strip()
    if text.startswith("mesh["):
        return _mesh(text)
    if text.startswith("["):
        return _rows(_iota(text))
    if not text.startswith("{"):
        raise ValueError(f"replica_groups={text[:80]} is in no notation that is known here")
    found = pairs(text)
    return found or (tuple(range(devices)),)


@functools.cache
def pairs(text: str) -> Groups:
    """The inner lists of `{{0,1},{2,3}}`; `{0,1}` is one list, and `{}` none."""
    lists = re.findall(r"\{([\d,\s]+)\}", text)
    return tuple(tuple(map(int, inner.split(","))) for inner in lists)


def _mesh(text: str) -> Groups:
    """Groups along some axes of a mesh, each of which may be split in (before, part, after)."""
    head, _, members = text.rpartition("{")
    names, sizes = zip(*_AXIS.findall(head.partition("]")[0]), strict=True)
    wanted = {name: (before, part) for name, before, part in _MEMBER.findall(members)}
    shape: list[int] = []
    inside: list[int] = []
    for name, size in zip(names, map(int, sizes), strict=True):
        if name in wanted:
            before = int(wanted[name][0] or 1)
            part = int(wanted[name][1] or size)
            inside.append(len(shape) + 1)
            shape += [before, part, size // (before * part)]
        else:
            shape.append(size)
    _, ordered, ids = head.partition("device_ids=")
    count = math.prod(shape)
    devices = _devices(ids, count) if ordered else np.arange(count)
    moved = np.moveaxis(devices.reshape(shape), inside, range(-len(inside), 0))
    width = math.prod(shape[axis] for axis in inside)
    return _rows(moved.reshape(-1, width))


def _devices(ids: str, count: int) -> npt.NDArray[np.int_]:
    """The devices of a mesh in its order: `([2,4]T(1,0))`, or their numbers one by one."""
    if "T(" in ids or "<=" in ids:
        return _iota(ids).reshape(-1)
    listed = np.array([int(number) for number in re.findall(r"\d+", ids)])
    return listed if listed.size == count else np.arange(count)


def _iota(text: str) -> npt.NDArray[np.int_]:
    """`[4,2]<=[2,4]T(1,0)`: 0, 1, 2, .. as [2,4], transposed, as [4,2]."""
    found = _IOTA.search(text)
    if found is None:
        raise ValueError(f"replica_groups={text[:80]} is in no notation that is known here")
    shape, source, order = (
        [int(n) for n in part.split(",")] if part else [] for part in found.groups()
    )
    devices = np.arange(math.prod(shape)).reshape(source or shape)
    moved = devices.transpose(order) if order else devices
    return moved.reshape(shape) if source else moved


def _rows(array: npt.NDArray[np.int_]) -> Groups:
    return tuple(tuple(map(int, row)) for row in array)

"""Schedules by name: a file of this folder is an algorithm, its `lanes(t)` the schedule.

Nothing is listed here. To add an algorithm, add a file with `lanes(t) -> tuple[Lane, ...]`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil

from collective_matmul.lanes import Lane, check_covering


@functools.cache
def names() -> tuple[str, ...]:
    """The algorithms there are, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@functools.cache
def lanes(name: str, t: int) -> tuple[Lane, ...]:
    """The schedule of algorithm `name` for `t` devices, checked to cover them.

    Raises:
      ValueError: if there is no such algorithm (with the nearest name), or its lanes miss a shard.
    """
    if name not in names():
        near = difflib.get_close_matches(str(name), names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown algorithm {name!r}; there are {', '.join(names())}.{hint}")
    schedule = importlib.import_module(f"{__name__}.{name}").lanes(t)
    check_covering(schedule, t)
    return schedule

"""Every way of this library that can be named: a backend, and an algorithm where it takes one."""

from __future__ import annotations

from typing import Any, cast

from collective_matmul import algorithms, backends
from collective_matmul.hardware import Chip


def plans(timed_on: Chip | None = None) -> list[tuple[str, str | None]]:
    """Every (backend, algorithm) there is; a backend that does not decompose has None.

    Args:
      timed_on: leaves out whose kernels would be interpreted on this chip.
    """
    return [
        (name, algorithm)
        for name in backends.names()
        for backend in [cast(Any, backends.get(name))]
        if not (timed_on and backend.decomposes and backend.interpreted(timed_on))
        for algorithm in (algorithms.names() if backend.decomposes else (None,))
    ]


def plan_name(backend: str, algorithm: str | None) -> str:
    """A plan in a word or two."""
    return f"{backend} {algorithm}" if algorithm else backend

"""Every way of this library that can be named: a backend, and an algorithm where it takes one."""

from __future__ import annotations

from collective_matmul import algorithms, backends


def plans() -> list[tuple[str, str | None]]:
    """Every (backend, algorithm) there is; a backend that does not decompose has None."""
    return [
        (backend, algorithm)
        for backend in backends.names()
        for algorithm in (algorithms.names() if backends.get(backend).decomposes else (None,))
    ]


def plan_name(backend: str, algorithm: str | None) -> str:
    """A plan in a word or two."""
    return f"{backend} {algorithm}" if algorithm else backend

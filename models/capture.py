"""Activations by name: what `model(images, capture=("block_*/attention_logits",))` returns."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable

import jax


class Capture:
    """Notes the activations that somebody wants.

    Args:
      wanted: whether an activation of this name is to be kept.
    """

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self.wanted = wanted
        self.names: list[str] = []
        self.found: dict[str, jax.Array] = {}

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        """x itself, noted under its name."""
        self.names.append(name)
        if self.wanted(name):
            self.found[name] = x
        return x

    def derived(self, name: str, make: Callable[[], jax.Array]) -> None:
        """Notes what `make` computes, which it does only if somebody wants it."""
        self.names.append(name)
        if self.wanted(name):
            self.found[name] = make()


class Patterns(Capture):
    """A capture of all names that match a pattern, such as `"block_3/*"`.

    Args:
      patterns: names, with `*`, `?` and `[...]` as in file names.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        super().__init__(lambda name: any(fnmatch.fnmatchcase(name, p) for p in self.patterns))

    def check(self) -> None:
        """Called when all activations have passed.

        Raises:
          ValueError: if a pattern matched none of them.
        """
        for pattern in self.patterns:
            if not fnmatch.filter(self.names, pattern):
                raise ValueError(f"no activation is called {pattern!r}; there are {self.names}")

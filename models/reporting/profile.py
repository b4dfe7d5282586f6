"""A profiler trace of a few steps, on request."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import jax

from models.reporting.config import Report


class Profile:
    """Starts and ends a trace; a context manager, so that one that was begun is always written.

    Args:
      config: which steps.
      folder: gets the trace, for TensorBoard's profile page, XProf or Perfetto.
      say: is told where it is.
    """

    def __init__(self, config: Report, folder: pathlib.Path, say: Callable[[str], None]) -> None:
        self._first = config.profile
        self._steps = config.profile_steps
        self._folder = folder
        self._say = say
        self._running = False

    def before(self, step: int) -> None:
        """To be called before step number `step` is dispatched."""
        if self._first is None:
            return
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step == self._first + self._steps:
            self._end()

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._say(f"a profiler trace of {self._steps} steps is in {self._folder}")

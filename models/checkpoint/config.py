"""When checkpoints are saved and how many are kept: a part of a run's config."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """How a run saves its state.

    Raises:
      ValueError: if a number makes no sense.
    """

    every: int | None = None
    """steps from one checkpoint to the next; None: none is saved"""
    keep: int = 3
    """how many of the newest are kept"""
    keep_every: int | None = None
    """those whose step is a multiple of this are kept for ever; None: no others are"""
    retry: int | None = None
    """steps after which a failed save is tried again; None: a tenth of `every`"""
    strict: bool = False
    """a damaged checkpoint ends the run; else the next older one is restored, with a warning"""
    timeout: float = 1200.0
    """seconds that a save in the background may take until it counts as failed"""

    def __post_init__(self) -> None:
        for name in ("every", "keep", "keep_every", "retry"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name}={value} must be at least 1")
        if self.timeout <= 0:
            raise ValueError(f"checkpoint.timeout={self.timeout} seconds must be positive")

    @property
    def patience(self) -> int:
        """Steps from a failed save to the next attempt."""
        return self.retry or max(1, (self.every or 1) // 10)

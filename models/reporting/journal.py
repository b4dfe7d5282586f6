"""What a run tells while it runs: the same numbers to the metrics file and to the progress line."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax

from models.reporting.metrics import Metrics
from models.reporting.progress import Progress
from models.reporting.speed import Speed


class Fetched(NamedTuple):
    """What a step gave: after it `step` steps were made; numbers are shown, marks are not."""

    step: int
    numbers: dict[str, float]
    marks: dict[str, Any]


class Journal:
    """Fetches the numbers of a step when the next one is under way, so that no step waits for them.

    Args:
      file: where numbers are kept.
      line: where they are shown.
      speed: what makes rates of a step's duration.
    """

    def __init__(self, file: Metrics, line: Progress, speed: Speed) -> None:
        self.file = file
        self.line = line
        self.speed = speed
        self.began = self.tick = time.perf_counter()
        self.waiting: tuple[int, dict[str, jax.Array], dict[str, Any], float] | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def say(self, text: str) -> None:
        """Shows a line, with the time."""
        self.line.say(f"{self.seconds:6.1f} s  {text}")
        self.tick = time.perf_counter()

    def trained(
        self,
        step: int,
        numbers: dict[str, jax.Array],
        marks: dict[str, Any] | None = None,
        waited: float = 0.0,
    ) -> Fetched | None:
        """Takes what a step just dispatched will give, and reports the step before.

        Args:
          step: how many steps were made.
          numbers: float32 scalars.
          marks: arrays of the step that are fetched with them, and not shown.
          waited: seconds that the step waited for its data.

        Returns:
          What the step before gave; None if there is none.
        """
        before = self.flush()
        self.waiting = step, numbers, marks or {}, waited
        return before

    def flush(self) -> Fetched | None:
        """Waits for the last step, and reports it. Returns as `trained`, of that step."""
        if self.waiting is None:
            return None
        step, numbers, marks, waited = self.waiting
        self.waiting = None
        fetched, marks = jax.device_get((numbers, marks))
        values = {name: float(value) for name, value in fetched.items()}
        before, self.tick = self.tick, time.perf_counter()
        rates = self.speed.rates(self.tick - before)
        self.file.write(step=step, **values, **rates, data_wait=waited, seconds=self.seconds)
        self.line.step(step, values, rates, waited / max(self.tick - before, 1e-9))
        return Fetched(step, values, marks)

    def drop(self) -> None:
        """Forgets the last step, which will be made again."""
        self.waiting = None

    def evaluated(self, step: int, loss: float, accuracy: float) -> None:
        """Reports the test images after `step` steps."""
        self.file.write(step=step, test_loss=loss, test_accuracy=accuracy, seconds=self.seconds)
        self.say(
            f"step {step:>{len(str(self.line.steps))}} of {self.line.steps}  test loss {loss:.4f}  "
            f"test accuracy {accuracy:.2%}"
        )

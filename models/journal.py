"""What a run tells while it runs: the same numbers to the metrics file and to the progress line."""

from __future__ import annotations

import time

import jax

from models.metrics import Metrics
from models.progress import Progress


class Journal:
    """Fetches the numbers of a step when the next one is under way, so that no step waits for them.

    Args:
      file: where numbers are kept.
      line: where they are shown.
      batch: images of one step.
    """

    def __init__(self, file: Metrics, line: Progress, batch: int) -> None:
        self.file = file
        self.line = line
        self.batch = batch
        self.began = self.tick = time.perf_counter()
        self.waiting: tuple[int, dict[str, jax.Array]] | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def say(self, text: str) -> None:
        """Shows a line, with the time."""
        self.line.say(f"{self.seconds:6.1f} s  {text}")
        self.tick = time.perf_counter()

    def trained(self, step: int, numbers: dict[str, jax.Array]) -> None:
        """Takes the numbers of a step just dispatched, and reports the step before."""
        self.flush()
        self.waiting = step, numbers

    def flush(self) -> None:
        """Waits for the last step, and reports it."""
        if self.waiting is None:
            return
        step, numbers = self.waiting
        self.waiting = None
        values = {name: float(value) for name, value in jax.device_get(numbers).items()}
        before, self.tick = self.tick, time.perf_counter()
        duration = self.tick - before
        self.file.write(
            step=step, **values, images_per_second=self.batch / duration, seconds=self.seconds
        )
        self.line.step(step, values["loss"], values["accuracy"], self.batch / duration, duration)

    def evaluated(self, step: int, loss: float, accuracy: float) -> None:
        """Reports the test images after `step` updates."""
        self.file.write(step=step, test_loss=loss, test_accuracy=accuracy, seconds=self.seconds)
        self.say(
            f"step {step:>{len(str(self.line.steps))}} of {self.line.steps}  test loss {loss:.4f}  "
            f"test accuracy {accuracy:.2%}"
        )

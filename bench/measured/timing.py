"""Wall-clock times of one call: warm-up, rounds, the median and the spread.

Neither jax nor torch is imported here: a caller says how to wait for what a call has begun
(`jax.block_until_ready`, `torch.cuda.synchronize`), and everything is timed by the same rules.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call, a number for each round, in the order in which they ran."""

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("there is no time without a round; measure at least one")

    @property
    def median(self) -> float:
        """The middle round, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Seconds from the first quartile to the third; 0 for a single round."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return third - first


def measure(
    call: Callable[[], Any],
    wait: Callable[[Any], Any],
    *,
    rounds: int = 10,
    warmup: int = 2,
    at_least: float = 0.0,
) -> Times:
    """Times `wait(call())`.

    Args:
      call: begins the work and returns what to wait for.
      wait: returns when that is there.
      rounds: how many times are taken.
      warmup: calls before the first of them, of which the first compiles.
      at_least: seconds that a round lasts. Shorter calls are repeated within it, begun one after
        the other as a program begins them, and the round's time divided.

    Raises:
      ValueError: if there is not at least one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    for _ in range(warmup):
        once(call, wait)
    repeats = 1
    if at_least:
        repeats = max(1, round(at_least / once(call, wait)))
    return Times(tuple(once(call, wait, repeats) for _ in range(rounds)))


def alternate(
    calls: Sequence[Callable[[], Any]], wait: Callable[[Any], Any], *, rounds: int, warmup: int = 2
) -> tuple[Times, ...]:
    """As `measure`, the calls taking turns, so that all of them see the same busy machine.

    Returns:
      The times of each call, in the order of `calls`.
    """
    for call in calls:
        for _ in range(warmup):
            once(call, wait)
    taken = [[once(call, wait) for call in calls] for _ in range(rounds)]
    return tuple(Times(times) for times in zip(*taken, strict=True))


def once(call: Callable[[], Any], wait: Callable[[Any], Any], repeats: int = 1) -> float:
    """Seconds of one call among `repeats` that are begun one after the other."""
    began = time.perf_counter()
    for _ in range(repeats):
        result = call()
    wait(result)
    return (time.perf_counter() - began) / repeats

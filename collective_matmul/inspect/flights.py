"""Transfers in flight: how far each has come, while they share links and memory."""

from __future__ import annotations

import dataclasses
from typing import Any

from collective_matmul.inspect.network import Network, Route

_DONE = 1e-13  # s: what is left of a transfer when rounding is all that is left


@dataclasses.dataclass(eq=False)
class Flight:
    """A transfer between its start and its end; times in seconds.

    Args:
      key: of the instruction that started it, and what else tells it from others.
      start: when it started.
      moves: when its first byte moves, after the latency.
      left: time that its busiest link still needs, were it alone.
      route: the links; None for a copy between HBM and on-chip memory.
    """

    key: tuple[Any, ...]
    start: float
    moves: float
    left: float
    route: Route | None
    end: float | None = None
    hidden: float = 0.0
    exposed: float = 0.0


class Flights:
    """All transfers in flight on one device.

    Args:
      network: shares the links.
    """

    def __init__(self, network: Network):
        self._network = network
        self._active: list[Flight] = []

    def launch(self, flight: Flight) -> None:
        """Starts a transfer; one without any work has arrived at once."""
        if flight.left <= _DONE and flight.moves <= flight.start:
            flight.end = flight.start
        else:
            self._active.append(flight)

    def compute(self, now: float, seconds: float, busy: float = 1.0) -> float:
        """Passes time in which the device computes; returns the time then.

        Args:
          now: when it begins.
          seconds: how long it takes.
          busy: share of it in which the device computes, where it also waits in between.
        """
        until = now + seconds
        while self._active and now < until:
            step = min(until, self._next(now))
            for flight in self._active:
                flight.hidden += busy * (step - now)
            self._pass(now, step)
            now = step
        return until

    def wait(self, now: float, flight: Flight) -> float:
        """Passes time until `flight` has arrived; returns the time then."""
        while flight.end is None:
            step = self._next(now)
            flight.exposed += step - now
            self._pass(now, step)
            now = step
        return now

    def _slow(self, now: float) -> list[float]:
        """How many times as long each transfer takes as it would alone; 0: it does not move yet."""
        moving = [f for f in self._active if now >= f.moves]
        routed = [f for f in moving if f.route is not None]
        slowdowns = self._network.slowdowns(tuple(f.route for f in routed if f.route is not None))
        slow = {f: float(len(moving) - len(routed)) for f in moving if f.route is None}
        slow |= dict(zip(routed, slowdowns, strict=True))
        return [slow.get(f, 0.0) for f in self._active]

    def _next(self, now: float) -> float:
        """When the next transfer begins to move, or arrives."""
        return min(
            now + f.left * slow if slow else f.moves
            for f, slow in zip(self._active, self._slow(now), strict=True)
        )

    def _pass(self, now: float, until: float) -> None:
        for flight, slow in zip(self._active, self._slow(now), strict=True):
            if slow:
                flight.left -= (until - now) / slow
                if flight.left <= _DONE:
                    flight.end = until
        self._active = [f for f in self._active if f.end is None]

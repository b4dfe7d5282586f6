"""Work cut into steps while it is traced, so that hops can be put beside products one by one.

`Steps` is a generator over traced arrays. There are two kinds:

    products    yields, after each product, what it made and what the next one uses, gets both back,
                and multiplies
    a journey   yields what is in flight after each round of hops, gets it back, and hops on

`beside` runs one of each, and ties what a product uses to the round that was to have arrived before
it. So round i travels beside product i. The compiler orders independent work as it likes: it left
hops that nothing near waited for to places where there was no product, and hid none of them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from jax import lax

Result = TypeVar("Result")
Other = TypeVar("Other")
Steps = Generator[Any, Any, Result]


class _Run:
    """A generator that is under way: what it yielded last, or, once it is over, its result."""

    def __init__(self, steps: Steps[Any]) -> None:
        self.steps = steps
        self.value: Any = None
        self.over = False

    def advance(self) -> None:
        try:
            self.value = self.steps.send(self.value)
        except StopIteration as end:
            self.value, self.over = end.value, True

    def finish(self) -> Any:
        while not self.over:
            self.advance()
        return self.value


def finish(steps: Steps[Result]) -> Result:
    """All steps, one after another, with nothing between them."""
    result: Result = _Run(steps).finish()
    return result


def together(journeys: Sequence[Steps[Any]]) -> Steps[tuple[Any, ...]]:
    """Several journeys as one: a round of it is a round of each that is not over."""
    runs = [_Run(journey) for journey in journeys]
    while True:
        for run in runs:
            if not run.over:
                run.advance()
        flying = [run for run in runs if not run.over]
        if not flying:
            return tuple(run.value for run in runs)
        for run, value in zip(flying, (yield [run.value for run in flying]), strict=True):
            run.value = value


def beside(products: Steps[Result], journey: Steps[Other]) -> tuple[Result, Other]:
    """A round of the journey beside each product, and what is left of either alone.

    Returns:
      The results of both.
    """
    work, travel = _Run(products), _Run(journey)
    travel.advance()
    work.advance()
    while not (work.over or travel.over):
        work.value, travel.value = lax.optimization_barrier((work.value, travel.value))
        travel.advance()
        work.advance()
    left = travel.finish()
    return work.finish(), left

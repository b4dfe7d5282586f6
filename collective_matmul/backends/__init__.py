"""Executors by name: a file of this folder is a backend. Nothing is listed here.

A backend is a module with

    decomposes: bool                  does it walk the lanes of an algorithm?
    unsupported(op, lanes, chip)      why it cannot run `op` on such a chip, or None
    gather(op, plan, moved, others) -> tuple of results, one a term
    scatter(op, plan, lhs, rhs) -> this device's shard of the sum of the terms

and, if it decomposes (`Decomposing`),

    accumulates: bool                 can it add up a contracted product chunk by chunk?
    interpreted(chip)                 do its kernels run operation by operation on such a chip?
    margin: float                     of the time, what it must promise to save to be chosen
    walked(op, plan, chip)            seconds of compute, and of waiting

and, if it can be run in steps (see `collective_matmul.steps`),

    gather_steps, scatter_steps       the same as generators
    arrive(op, plan, moved)           a bare gather's journey, to a list of arrays
    assembled(op, plan, arrivals)     what those are together

and, if a scatter's kernel can carry what a gather moves,

    carries(op, lanes)                can it be of this gather, along these lanes?
    carry(op, plan, lhs, rhs, beside, moved, others)
                                      scatter's result, and the results of the gather `beside` it

It must agree with `unfused` on everything that it does not refuse. `NAME+checked` is the backend
NAME, with a column checksum of all that it computes; it runs only where it is named.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import jax

from collective_matmul.backends._checked import SUFFIX, Checked
from collective_matmul.hardware import Chip
from collective_matmul.lanes import Lane
from collective_matmul.operation import Operation, Plan
from collective_matmul.slab import Slab
from collective_matmul.steps import Steps


class Backend(Protocol):
    """What a file of this folder defines."""

    decomposes: bool

    def unsupported(self, op: Operation, lanes: tuple[Lane, ...], chip: Chip) -> str | None:
        """Why the backend cannot run `op`, or None if it can.

        Args:
          op: any operation.
          lanes: that it is to walk, if it decomposes.
          chip: on which.
        """

    def gather(
        self, op: Operation, plan: Plan, moved: jax.Array, others: Sequence[jax.Array | None]
    ) -> tuple[jax.Array, ...]:
        """`y_i = G(x) . w_i` for every term i."""

    def scatter(
        self, op: Operation, plan: Plan, lhs: Sequence[jax.Array], rhs: Sequence[jax.Array | None]
    ) -> jax.Array:
        """`y = S(sum_i x_i . w_i)`."""


class Decomposing(Backend, Protocol):
    """A backend that walks lanes."""

    accumulates: bool
    margin: float

    def interpreted(self, chip: Chip) -> bool:
        """Whether its kernels run operation by operation on such a chip: for tests, not for use."""

    def walked(self, op: Operation, plan: Plan, chip: Chip) -> tuple[float, float]:
        """What a plan takes: seconds of compute, and of waiting."""


@runtime_checkable
class Stepwise(Backend, Protocol):
    """A backend whose operations can be run in steps."""

    def gather_steps(
        self,
        op: Operation,
        plan: Plan,
        moved: jax.Array,
        others: Sequence[jax.Array | None],
        into: Slab | None = None,
        arrivals: list[jax.Array] | None = None,
        alone: bool = False,
    ) -> Steps[tuple[Any, ...]]:
        """`gather`, its one result written into a slab if there is one; perhaps of `arrivals`, and
        `alone` if no step is tied to what others do."""

    def scatter_steps(
        self, op: Operation, plan: Plan, lhs: Sequence[jax.Array], rhs: Sequence[jax.Array | None]
    ) -> Steps[jax.Array]:
        """`scatter`."""

    def arrive(self, op: Operation, plan: Plan, moved: jax.Array) -> Steps[list[jax.Array]]:
        """A bare gather's journey: what has arrived in the end."""

    def assembled(self, op: Operation, plan: Plan, arrivals: list[jax.Array]) -> jax.Array:
        """What arrived, put together."""


@runtime_checkable
class Carrying(Backend, Protocol):
    """A backend whose scatter can move a gather's operand besides."""

    def carries(self, op: Operation, lanes: tuple[Lane, ...]) -> bool:
        """Whether what the gather `op` moves can be carried along these lanes."""

    def carry(
        self,
        op: Operation,
        plan: Plan,
        lhs: Sequence[jax.Array],
        rhs: Sequence[jax.Array | None],
        beside: Operation,
        moved: jax.Array,
        others: Sequence[jax.Array | None],
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """`scatter`, and the `gather` beside it."""


@functools.cache
def names() -> tuple[str, ...]:
    """The backends there are, in alphabetical order."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def get(name: str) -> Backend:
    """The backend called `name`.

    Raises:
      ValueError: if there is none, with the nearest name.
    """
    if str(name).endswith(SUFFIX):
        return Checked(get(name.removesuffix(SUFFIX)))
    if name not in names():
        near = difflib.get_close_matches(str(name), names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(names())}.{hint}")
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))

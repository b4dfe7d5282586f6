"""Operations by steps, for code that writes its own derivative and puts hops beside its products.

What `duality` runs whole, and by the same plans; nothing here can be differentiated. A backend that
has no steps runs an operation in one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from collective_matmul import backends
from collective_matmul.arguments import Call
from collective_matmul.cost import choose_journey, choose_steps
from collective_matmul.operation import Operation
from collective_matmul.slab import Slab
from collective_matmul.steps import Steps

Others = Sequence[jax.Array | None]


def gather(
    op: Operation, moved: jax.Array, others: Others, into: Slab | None = None
) -> Steps[tuple[Any, ...]]:
    """`y_i = G(x) . w_i`; with `into` the one y is written there.

    Whoever takes the steps says in what order, so the plan holds none.
    """
    plan = dataclasses.replace(choose_steps(op), held=False)
    backend = backends.get(plan.backend)
    if isinstance(backend, backends.Stepwise):
        return (yield from backend.gather_steps(op, plan, moved, others, into))
    results = yield backend.gather(op, plan, moved, others)
    return results if into is None else (into.written(results[0], 0, 0),)


def scatter(op: Operation, lhs: Sequence[jax.Array], rhs: Others) -> Steps[jax.Array]:
    """`y = S(sum_i x_i . w_i)`."""
    plan = choose_journey(op) if op.bare else choose_steps(op)
    backend = backends.get(plan.backend)
    if isinstance(backend, backends.Stepwise):
        return (yield from backend.scatter_steps(op, plan, lhs, rhs))
    return (yield backend.scatter(op, plan, lhs, rhs))


def arrive(op: Operation, moved: jax.Array) -> Steps[list[jax.Array]]:
    """What a bare gather brings, for `assembled`."""
    plan = choose_journey(op)
    backend = backends.get(plan.backend)
    if isinstance(backend, backends.Stepwise):
        return (yield from backend.arrive(op, plan, moved))
    return list(backend.gather(op, plan, moved, (None,)))


def assembled(op: Operation, arrived: list[jax.Array]) -> jax.Array:
    """What a bare gather brought, put together."""
    plan = choose_journey(op)
    backend = backends.get(plan.backend)
    if isinstance(backend, backends.Stepwise):
        return backend.assembled(op, plan, arrived)
    return arrived[0]


def gather_into(call: Call, into: Slab) -> Steps[Slab]:
    """`y = G(x) . w` of a call, written there."""
    (y,) = yield from gather(call.op, call.lhs[0], call.rhs, into)
    return y


def gradient_of_scatter(call: Call, dy: jax.Array) -> Steps[tuple[jax.Array, jax.Array]]:
    """dx and dw of `y = S(x . w)`: both are fed by one gather of dy."""
    (x,), (w,) = call.lhs, call.rhs
    dx, dw = yield from gather(call.op.dual_of_scatter(), dy, (w, x))
    return dx, dw


def gradient_of_moved(call: Call, dy: jax.Array) -> Steps[jax.Array]:
    """dx of `y = G(x) . w`, after dw: nothing is left for it to pass under."""
    alone = dataclasses.replace(call.op.dual_of_moved(), beside=None)
    return scatter(alone, (dy,), call.rhs)


def gradient_of_other(call: Call, dy: jax.Array) -> Steps[jax.Array]:
    """dw of `y = G(x) . w`: x is gathered anew."""
    dual: Any = call.op.dual_of_others()
    (dw,) = yield from gather(dual, call.lhs[0], (dy,))
    return dw

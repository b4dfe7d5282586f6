"""Running an operation, and its derivative: the same two operations again.

The gradient of a gather is a scatter (for what moved) and a gather (for the others), the gradient
of a scatter one gather of the cotangent that feeds them all (`operation.py` has the equations). So
both operands' gradients overlap as the forward pass does, each by a schedule of its own choice, and
gradients of gradients do too. What is kept for the backward pass is shards: a gathered operand is
gathered anew.

The rule is a `jax.custom_vjp`, which jax cannot differentiate forwards: `jax.jvp` raises its
TypeError. A Hessian-vector product is reverse over reverse.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from collective_matmul import backends
from collective_matmul.arguments import Call
from collective_matmul.cost import choose
from collective_matmul.operation import Operation
from collective_matmul.steps import beside, finish
from collective_matmul.varying import varying_axes, varying_over

Others = tuple[jax.Array | None, ...]


def run(call: Call) -> Any:
    """Runs a call that has been read."""
    op = call.op
    names = op.axis_name if isinstance(op.axis_name, tuple) else (op.axis_name,)
    mesh = jax.sharding.get_abstract_mesh()
    manual = mesh.manual_axes
    op = dataclasses.replace(
        op,
        of_vmap=not set(names) <= set(manual),
        partly_manual=bool(manual) and set(manual) != set(mesh.axis_names),
    )
    operands = [x for x in (*call.lhs, *call.rhs) if x is not None]
    everywhere = frozenset(names).intersection(manual).union(*map(varying_axes, operands))
    lhs, rhs = jax.tree.map(lambda x: varying_over(x, everywhere), (call.lhs, call.rhs))
    smooth = jnp.issubdtype(op.terms[0].lhs.dtype, jnp.inexact)  # integers have no derivative
    if op.kind == "scatter":
        return (_scatter if smooth else _run_scatter)(op, lhs, rhs)
    results = (_gather if smooth else _run_gather)(op, lhs[0], rhs)
    return results[0] if call.single else results


def _run_gather(op: Operation, moved: jax.Array, others: Others) -> tuple[jax.Array, ...]:
    plan = choose(op)
    return backends.get(plan.backend).gather(op, plan, moved, others)


def _run_scatter(op: Operation, lhs: tuple[jax.Array, ...], rhs: Others) -> jax.Array:
    plan = choose(op)
    return backends.get(plan.backend).scatter(op, plan, lhs, rhs)


_gather = jax.custom_vjp(_run_gather, nondiff_argnums=(0,))
_scatter = jax.custom_vjp(_run_scatter, nondiff_argnums=(0,))


def _gather_fwd(op: Operation, moved: jax.Array, others: Others) -> tuple[Any, Any]:
    needed = any(other is not None for other in others)  # a bare collective's gradient needs none
    return _gather(op, moved, others), (moved if needed else None, others)


def _gather_bwd(op: Operation, shards: Any, cotangents: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    moved, others = shards
    dual = op.dual_of_others()
    if dual is None:
        return _scatter(op.dual_of_moved(), cotangents, others), others
    both = _side_by_side if choose(dual).held else _one_by_one
    d_moved, found = both(op, moved, others, cotangents)
    grads = iter(found)
    return d_moved, tuple(None if other is None else next(grads) for other in others)


def _one_by_one(op: Operation, moved: Any, others: Others, cotangents: Any) -> Any:
    """The cotangents of what moved and of the others, which there are; XLA orders the two."""
    d_moved = _scatter(op.dual_of_moved(), cotangents, others)
    dual: Any = op.dual_of_others()
    return d_moved, _gather(dual, moved, _fed(cotangents, others))


def _run_side_by_side(op: Operation, moved: Any, others: Others, cotangents: Any) -> Any:
    """The same, a round of the gather's hops beside each product of the scatter; or beside the
    scatter's kernel its one round, or within that all of them.

    XLA multiplies the gathered operand first, and waits for it (cost.`HELD`).
    """
    scatter, dual = op.dual_of_moved(), op.dual_of_others()
    assert dual is not None
    steps, journey = choose(scatter), choose(dual)
    ahead, behind = backends.get(steps.backend), backends.get(journey.backend)
    fed = _fed(cotangents, others)
    if not isinstance(behind, backends.Stepwise):
        assert isinstance(ahead, backends.Carrying)
        return ahead.carry(scatter, steps, cotangents, others, dual, moved, fed)
    arrive = behind.arrive(dual, journey, moved)
    if isinstance(ahead, backends.Stepwise):
        products = ahead.scatter_steps(scatter, steps, cotangents, others)
        d_moved, arrivals = beside(products, arrive)
    else:
        made = ahead.scatter(scatter, steps, cotangents, others)
        d_moved, arrivals = lax.optimization_barrier((made, finish(arrive)))
    rest = behind.gather_steps(dual, journey, moved, fed, arrivals=arrivals, alone=True)
    return d_moved, finish(rest)


def _fed(cotangents: Any, others: Others) -> tuple[jax.Array, ...]:
    """The cotangents of products with another operand."""
    return tuple(dy for dy, other in zip(cotangents, others, strict=True) if other is not None)


_side_by_side = jax.custom_vjp(_run_side_by_side, nondiff_argnums=(0,))


def _side_by_side_fwd(op: Operation, *operands: Any) -> tuple[Any, Any]:
    return _side_by_side(op, *operands), operands


def _side_by_side_bwd(op: Operation, operands: Any, cotangents: Any) -> Any:
    return jax.vjp(functools.partial(_one_by_one, op), *operands)[1](cotangents)


_side_by_side.defvjp(_side_by_side_fwd, _side_by_side_bwd)


def _scatter_fwd(op: Operation, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    kept = tuple(None if y is None else x for x, y in zip(lhs, rhs, strict=True))
    return _scatter(op, lhs, rhs), (kept, rhs)


def _scatter_bwd(op: Operation, shards: Any, cotangent: jax.Array) -> tuple[Any, Any]:
    lhs, rhs = shards
    paired = tuple(x for x, y in zip(lhs, rhs, strict=True) if y is not None)
    grads = _gather(op.dual_of_scatter(), cotangent, (*rhs, *paired))  # the cotangent travels once
    d_lhs, rest = grads[: len(lhs)], iter(grads[len(lhs) :])
    return d_lhs, tuple(None if other is None else next(rest) for other in rhs)


_gather.defvjp(_gather_fwd, _gather_bwd)
_scatter.defvjp(_scatter_fwd, _scatter_bwd)

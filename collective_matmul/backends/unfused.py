"""XLA's own collective, then (or after) one whole product: the oracle, and the small-shape choice.

Nothing overlaps here by construction; what XLA makes of it is XLA's affair.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax

from collective_matmul.hardware import Chip
from collective_matmul.lanes import Lane
from collective_matmul.operation import Operation, Plan
from collective_matmul.product import product, sum_of_products

decomposes = False


def unsupported(op: Operation, lanes: tuple[Lane, ...], chip: Chip) -> str | None:
    """Runs almost everything, but knows no algorithms."""
    del lanes, chip
    if op.algorithm is not None:
        return (
            f"it runs XLA's plain collective, which has no algorithm {op.algorithm!r} to follow; "
            "drop algorithm=, or name a backend that decomposes"
        )
    if op.of_vmap:
        return (
            f"jax traces derivative rules without the axis {op.axis_name!r} of jax.vmap, which its "
            "all_gather and psum_scatter need; name a backend that decomposes"
        )
    if op.kind == "scatter" and op.beside_explicit_axes:
        return "jax's psum_scatter fails in a partly manual shard_map beside axes of type Explicit"
    return None


def gather(
    op: Operation, plan: Plan, moved: jax.Array, others: Sequence[jax.Array | None]
) -> tuple[jax.Array, ...]:
    """`y_i = all_gather(x) . w_i`."""
    del plan
    dim = op.terms[0].spec.lhs.index(op.letter)
    whole = lax.all_gather(moved, op.axis_name, axis=dim, tiled=True)
    return tuple(
        product(term.spec, whole, other, term.out, op.precision).astype(term.out.dtype)
        for term, other in zip(op.terms, others, strict=True)
    )


def scatter(
    op: Operation, plan: Plan, lhs: Sequence[jax.Array], rhs: Sequence[jax.Array | None]
) -> jax.Array:
    """`y = psum_scatter(sum_i x_i . w_i)`; the sum crosses the wire in the wire dtype."""
    del plan
    total = sum_of_products(op, lhs, rhs)
    if op.t == 1:  # nothing crosses a wire, so nothing is rounded for it
        return total.astype(op.terms[0].out.dtype)
    total = total.astype(op.travelling.dtype)
    dim = op.terms[0].spec.out.index(op.letter)
    shard = lax.psum_scatter(total, op.axis_name, scatter_dimension=dim, tiled=True)
    return shard.astype(op.terms[0].out.dtype)

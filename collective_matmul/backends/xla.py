"""Lanes as `ppermute`s: each device multiplies the piece that it has while the next one travels.

The loops are unrolled, so that XLA's scheduler sees every hop and every product and can start each
permute ahead of the product beside it. Gathered results are written, slice by slice, into a buffer
that starts as `lax.empty`: one of zeros would be filled first, at 22 % (TPU v5e) to 88 % (v6e) of
the product's own cycles, as the compiler estimates them for 8192 x 6144 x 24576 over 8 devices.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import lax

from collective_matmul.lanes import WHOLE, parts, permutation, rounds
from collective_matmul.operation import Operand, Operation, Plan, Term, explicit_sharding
from collective_matmul.product import product, sum_of_products
from collective_matmul.spec import Spec
from collective_matmul.varying import varying_like

decomposes = True


def unsupported(op: Operation) -> str | None:
    """Runs everything."""
    del op
    return None


def gather(
    op: Operation, plan: Plan, moved: jax.Array, others: Sequence[jax.Array | None]
) -> tuple[jax.Array, ...]:
    """`y_i = G(x) . w_i`, a product (or a copy into the assembled operand) at every arrival."""
    arrivals = _arrivals(op, plan, moved)
    whole = None
    results = []
    for term, other in zip(op.terms, others, strict=True):
        if op.letter in term.spec.out:
            result = _filled(op, term, other, arrivals)
        elif plan.fat:
            whole = _filled(op, _bare(op), None, arrivals) if whole is None else whole
            result = product(term.spec, whole, other, term.out, op.precision)
        else:
            result = _accumulated(op, term, other, arrivals)
        results.append(result.astype(term.out.dtype))
    return tuple(results)


def scatter(
    op: Operation, plan: Plan, lhs: Sequence[jax.Array], rhs: Sequence[jax.Array | None]
) -> jax.Array:
    """`y = S(sum_i x_i . w_i)`: sums set out from afar and gain a product at every device."""
    shard, wire, out = op.shard_size, op.travelling.dtype, op.terms[0].out
    sums: dict[int, jax.Array] = {}  # by lane, what came in on its last hop
    for hop, moving in reversed(list(rounds(plan.lanes))):
        fresh: list[jax.Array] = []  # of lanes that set out in this round
        for i in sorted(moving, key=lambda i: i in sums):
            lane = plan.lanes[i]
            start, stop = lane.part.bounds(shard)
            if start < stop:
                piece = Piece(-lane.shift * hop, start, stop - start)
                after = fresh if len(moving) > 1 else None
                total = _partial(op, lhs, rhs, piece, sums.get(i), after, plan.whole)
                if i not in sums:
                    fresh.append(total)
                back = permutation(-lane.shift, op.t)
                sums[i] = lax.ppermute(total.astype(wire), op.axis_name, back)

    pieces = []
    for part in parts(plan.lanes):
        start, stop = part.bounds(shard)
        if start < stop:
            own = _partial(op, lhs, rhs, Piece(0, start, stop - start), None, None, whole=False)
            home = (x for i, x in sums.items() if plan.lanes[i].part == part)
            pieces.append(functools.reduce(operator.add, (x.astype(own.dtype) for x in home), own))
    dim = op.terms[0].spec.out.index(op.letter)
    total = pieces[0] if len(pieces) == 1 else lax.concatenate(pieces, dim)
    return total.astype(out.dtype)


class Piece(NamedTuple):
    """Rows `start : start + rows` of the shard of the device `offset` places ahead on the ring."""

    offset: int
    start: int
    rows: int


def _partial(
    op: Operation,
    lhs: Sequence[jax.Array],
    rhs: Sequence[jax.Array | None],
    piece: Piece,
    arrived: jax.Array | None,
    after: list[jax.Array] | None,
    whole: bool,
) -> jax.Array:
    """This device's products for the piece, plus the sum that has arrived for it.

    With `after` the product is held back until the sum is there. XLA then adds within the product's
    own kernel instead of in a pass of its own; it needs another sum in flight to hide the hop
    under, so it is for lanes that move side by side. What waits is the operand's slice, which is
    then a copy; or the operand as a `whole`, which the product slices itself (`cost.SLICING`), and
    that waits for the sums of `after` too: lanes that set out have nothing to wait for, and hide
    the hop (54 ms of ViT-22B's step on v4, where XLA left their products to the end).
    """
    tied = arrived is not None and after is not None
    if tied and whole:
        arrived, lhs, _ = lax.optimization_barrier((arrived, lhs, after))
    left = [_slice(op, x, term.spec.lhs, piece) for x, term in zip(lhs, op.terms, strict=True)]
    right = [
        x if x is None else _slice(op, x, term.spec.rhs or "", piece)
        for x, term in zip(rhs, op.terms, strict=True)
    ]
    if arrived is None:
        return sum_of_products(op, left, right)
    if tied and not whole:
        arrived, left = lax.optimization_barrier((arrived, left))
    total = sum_of_products(op, left, right)
    return total + arrived.astype(total.dtype)


def _arrivals(op: Operation, plan: Plan, moved: jax.Array) -> list[tuple[Piece, jax.Array]]:
    """Every chunk that this device gets to see, its own shard first, in order of arrival."""
    dim, shard = op.terms[0].spec.lhs.index(op.letter), op.shard_size
    arrivals = [(Piece(0, 0, shard), moved)]
    held = {}
    for i, lane in enumerate(plan.lanes):
        start, stop = lane.part.bounds(shard)
        if start < stop:
            held[i] = (
                moved if lane.part == WHOLE else lax.slice_in_dim(moved, start, stop, axis=dim)
            )
    for hop, moving in rounds(plan.lanes):
        for i in moving:
            if i in held:
                lane = plan.lanes[i]
                start, stop = lane.part.bounds(shard)
                held[i] = lax.ppermute(held[i], op.axis_name, permutation(lane.shift, op.t))
                arrivals.append((Piece(-lane.shift * hop, start, stop - start), held[i]))
    return arrivals


def _filled(
    op: Operation, term: Term, other: jax.Array | None, arrivals: list[tuple[Piece, jax.Array]]
) -> jax.Array:
    """A product whose result holds the letter: every arrival fills a slice of it."""
    dim, result = term.spec.out.index(op.letter), None
    for piece, chunk in arrivals:
        right = other if other is None else _slice(op, other, term.spec.rhs or "", piece)
        value = product(term.spec, chunk, right, term.out, op.precision)
        value = value.astype(term.out.dtype)
        if op.t == 1:
            return value
        if result is None:
            at = explicit_sharding(value)
            buffer = lax.empty(term.out.shape, term.out.dtype, out_sharding=at)
            result = varying_like(buffer, value)
        result = lax.dynamic_update_slice_in_dim(result, value, _first_row(op, piece), dim)
    assert result is not None
    return result


def _accumulated(
    op: Operation, term: Term, other: jax.Array | None, arrivals: list[tuple[Piece, jax.Array]]
) -> jax.Array:
    """A product that contracts the letter: every arrival adds its slice's product."""
    assert other is not None
    return functools.reduce(
        operator.add,
        (
            product(
                term.spec,
                chunk,
                _slice(op, other, term.spec.rhs or "", piece),
                term.out,
                op.precision,
            )
            for piece, chunk in arrivals
        ),
    )


def _bare(op: Operation) -> Term:
    """The term that only assembles the gathered operand."""
    letters, moved = op.terms[0].spec.lhs, op.terms[0].lhs
    shape = tuple(
        size * op.t if letter == op.letter else size
        for letter, size in zip(letters, moved.shape, strict=True)
    )
    return Term(Spec(letters, None, letters), moved, None, Operand(shape, moved.dtype))


def _slice(op: Operation, x: jax.Array, letters: str, piece: Piece) -> jax.Array:
    """The piece's rows of an operand that holds all of the letter; an operand without it, whole."""
    if op.letter not in letters or x.shape[letters.index(op.letter)] == piece.rows:
        return x
    dim = letters.index(op.letter)
    return lax.dynamic_slice_in_dim(x, _first_row(op, piece), piece.rows, axis=dim)


def _first_row(op: Operation, piece: Piece) -> jax.Array:
    """Where the piece begins in the whole letter, as this device counts."""
    ahead = lax.axis_index(op.axis_name) + np.int32(piece.offset % op.t)
    return lax.rem(ahead, np.int32(op.t)) * np.int32(op.shard_size) + np.int32(piece.start)

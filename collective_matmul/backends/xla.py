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
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from collective_matmul import walk
from collective_matmul.hardware import Chip
from collective_matmul.lanes import WHOLE, Lane, parts, permutation, rounds
from collective_matmul.memory import row_major
from collective_matmul.operation import Operand, Operation, Plan, Term, explicit_sharding
from collective_matmul.product import product, sum_of_products
from collective_matmul.slab import Slab
from collective_matmul.spec import Spec
from collective_matmul.steps import Steps, finish
from collective_matmul.varying import varying_like

decomposes = True
accumulates = True
margin = 0.0


def unsupported(op: Operation, lanes: tuple[Lane, ...], chip: Chip) -> str | None:
    """Runs everything."""
    del op, lanes, chip
    return None


def interpreted(chip: Chip) -> bool:
    """Nowhere."""
    del chip
    return False


def walked(op: Operation, plan: Plan, chip: Chip) -> tuple[float, float]:
    """Seconds of compute, and of waiting."""
    return (walk.gather if op.kind == "gather" else walk.scatter)(op, plan, chip)


def gather(
    op: Operation, plan: Plan, moved: jax.Array, others: Sequence[jax.Array | None]
) -> tuple[jax.Array, ...]:
    """`y_i = G(x) . w_i`, a product (or a copy into the assembled operand) at every arrival."""
    return finish(gather_steps(op, plan, moved, others, alone=True))


def scatter(
    op: Operation, plan: Plan, lhs: Sequence[jax.Array], rhs: Sequence[jax.Array | None]
) -> jax.Array:
    """`y = S(sum_i x_i . w_i)`: sums set out from afar and gain a product at every device."""
    return finish(scatter_steps(op, plan, lhs, rhs))


def gather_steps(
    op: Operation,
    plan: Plan,
    moved: jax.Array,
    others: Sequence[jax.Array | None],
    into: Slab | None = None,
    arrivals: list[jax.Array] | None = None,
    alone: bool = False,
) -> Steps[tuple[Any, ...]]:
    """`gather`, which yields after each product what it made, and what the next one uses.

    With `into` the one result is written there, and is returned as that slab. With `arrivals`, what
    `arrive` brings has been brought. `alone`: no step is tied to what others do.
    """
    if arrivals is None:
        arrivals = finish(arrive(op, plan, moved))
    whole = None
    results: list[Any] = []
    for term, other in zip(op.terms, others, strict=True):
        if op.letter in term.spec.out:
            result = yield from _filled(op, plan, term, other, arrivals, into)
        elif plan.fat:
            if whole is None:
                whole = row_major(assembled(op, plan, arrivals))
            # Of what is put together and an argument of the program XLA swaps the two, and then
            # copies their product transposed (2,048 x 7,680 x 6,144 on v6e: 378 us of 1,120). Among
            # ties of others a further one has cost more (`layers`, 838 us of hops on v4).
            if alone:
                whole, other = lax.optimization_barrier((whole, other))
            if plan.held and results:
                whole, results = lax.optimization_barrier((whole, results))
            result = product(term.spec, whole, other, term.out, op.precision)
            result, whole = yield result, whole
        else:
            result = yield from _accumulated(op, plan, term, other, arrivals)
        results.append(result if into else result.astype(term.out.dtype))
    return tuple(results)


def scatter_steps(
    op: Operation, plan: Plan, lhs: Sequence[jax.Array], rhs: Sequence[jax.Array | None]
) -> Steps[jax.Array]:
    """`scatter`, which yields after each product what it made, and what the next one uses.

    A bare one has nothing to multiply; it is a journey, and yields the sums in flight.
    """
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
                total, lhs = (total, lhs) if op.bare else (yield total, lhs)
                if i not in sums:
                    fresh.append(total)
                back = permutation(-lane.shift, op.t)
                sums[i] = lax.ppermute(total.astype(wire), op.axis_name, back)
        sums = (yield sums) if op.bare else sums

    pieces = []
    for part in parts(plan.lanes):
        start, stop = part.bounds(shard)
        if start < stop:
            own = _partial(op, lhs, rhs, Piece(0, start, stop - start), None, None, whole=False)
            own, lhs = (own, lhs) if op.bare else (yield own, lhs)
            if sums:  # else XLA adds within the own product, which then waits for the last hop
                own, sums = lax.optimization_barrier((own, sums))
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


def arrive(op: Operation, plan: Plan, moved: jax.Array) -> Steps[list[jax.Array]]:
    """Every chunk that this device gets to see, in order: its own shard, then what arrives.

    A journey: it yields what has just arrived, by lane.
    """
    dim, shard = op.terms[0].spec.lhs.index(op.letter), op.shard_size
    arrivals = [moved]
    held = {}
    for i, lane in enumerate(plan.lanes):
        start, stop = lane.part.bounds(shard)
        if start < stop:
            whole = lane.part == WHOLE
            held[i] = moved if whole else lax.slice_in_dim(moved, start, stop, axis=dim)
    for _, moving in rounds(plan.lanes):
        held = {i: x for i, x in held.items() if i in moving}
        for i, x in held.items():
            held[i] = lax.ppermute(x, op.axis_name, permutation(plan.lanes[i].shift, op.t))
        held = yield held
        arrivals += held.values()
    return arrivals


def assembled(op: Operation, plan: Plan, arrivals: list[jax.Array]) -> jax.Array:
    """The gathered operand, of what arrived."""
    return finish(_filled(op, plan, _bare(op), None, arrivals))


def _pieces(op: Operation, plan: Plan) -> list[Piece]:
    """What the arrivals are."""
    shard = op.shard_size
    found = [Piece(0, 0, shard)]
    for hop, moving in rounds(plan.lanes):
        for i in moving:
            start, stop = plan.lanes[i].part.bounds(shard)
            if start < stop:
                found.append(Piece(-plan.lanes[i].shift * hop, start, stop - start))
    return found


def _filled(
    op: Operation,
    plan: Plan,
    term: Term,
    other: jax.Array | None,
    arrivals: list[jax.Array],
    into: Slab | None = None,
) -> Steps[Any]:
    """A product whose result holds the letter: every arrival fills a slice of it."""
    dim, result = term.spec.out.index(op.letter), into
    chunk: Any = arrivals[0]
    for i, (piece, ahead) in enumerate(zip(_pieces(op, plan), [*arrivals[1:], None], strict=True)):
        right = other if other is None else _slice(op, other, term.spec.rhs or "", piece)
        value = product(term.spec, chunk, right, term.out, op.precision)
        value = value.astype(term.out.dtype)
        if op.t == 1 and into is None:
            return value
        if result is None:
            at = explicit_sharding(value)
            buffer = lax.empty(term.out.shape, term.out.dtype, out_sharding=at)
            result = Slab.of(varying_like(buffer, value))
        result = result.written(value, _first_row(op, piece), dim)
        result, chunk = (result, ahead) if other is None else (yield result, ahead)
        if plan.held and other is not None and ahead is not None:
            result, chunk = lax.optimization_barrier((result, chunk))
            arrivals[i + 1] = chunk  # and so is its copy into the assembled operand
    assert result is not None
    return result if into else result.read()


def _accumulated(
    op: Operation, plan: Plan, term: Term, other: jax.Array | None, arrivals: list[jax.Array]
) -> Steps[jax.Array]:
    """A product that contracts the letter: every arrival adds its slice's product."""
    assert other is not None
    values, chunk = [], arrivals[0]
    for piece, ahead in zip(_pieces(op, plan), [*arrivals[1:], None], strict=True):
        right = _slice(op, other, term.spec.rhs or "", piece)
        value = product(term.spec, chunk, right, term.out, op.precision)
        value, chunk = yield value, ahead
        values.append(value)
    return functools.reduce(operator.add, values)


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

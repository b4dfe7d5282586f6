"""Lanes as remote copies within one Pallas kernel for TPU, beside the products of the same kernel.

A chunk that is short is the permutes' weakness: each is a product of its own, which reads the
weights anew, and each hop a collective of its own. Here a round of hops is a panel of rows in a
kernel that goes on (`all_gather`, `reduce_scatter`). docs/performance.md has what that gains over
16 devices, predicted.

What is multiplied so are products whose moved letter is free (`forms`). Of any other, the kernel
is the collective alone: of a gather the products follow it, of a scatter they come before it.

On a machine without a TPU it runs where it is named, interpreted operation by operation: slow, for
tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from collective_matmul.backends.pallas_tpu.all_gather import all_gather
from collective_matmul.backends.pallas_tpu.arranging import Arrangement, arranged
from collective_matmul.backends.pallas_tpu.forms import Form, flat, sizes, unflat
from collective_matmul.backends.pallas_tpu.machine import Machine
from collective_matmul.backends.pallas_tpu.passing import ROOM, Passenger
from collective_matmul.backends.pallas_tpu.reduce_scatter import reduce_scatter
from collective_matmul.backends.pallas_tpu.walking import walked
from collective_matmul.hardware import Chip
from collective_matmul.lanes import Lane, steps
from collective_matmul.operation import Operation, Plan, Term
from collective_matmul.product import product, sum_of_products

__all__ = [
    "accumulates",
    "carries",
    "carry",
    "decomposes",
    "gather",
    "interpreted",
    "margin",
    "scatter",
    "unsupported",
    "walked",
]

decomposes = True
accumulates = False
margin = 0.03
"""At nine of ten forward points of `python -m bench grid` the model of a kernel (`walking`) errs by
no more, held against the compiler's schedule of it. Asked for 10 % instead, because no chip has
run these kernels yet, the choice was behind a kernel by name at 43 points, by up to 24 %."""


def unsupported(op: Operation, lanes: tuple[Lane, ...], chip: Chip) -> str | None:
    """Why no kernel runs `op` on this chip, or None."""
    if interpreted(chip) and op.backend is None:
        return "without a TPU it is interpreted, which is for tests: name it"
    if any(x.dtype.itemsize > 4 for term in op.terms for x in (term.lhs, term.out)):
        return f"no kernel knows numbers of 8 bytes, as {op.terms[0].lhs.dtype}"
    if op.of_vmap:
        return f"a kernel talks to devices, and {op.axis_name!r} is an axis of jax.vmap"
    if op.partly_manual or op.beside_explicit_axes:
        return "a kernel names devices by all axes of the mesh, and some are not manual here"
    found = arranged(op, lanes, Machine.of(chip)) if lanes else None
    return found if isinstance(found, str) else None


def interpreted(chip: Chip) -> bool:
    """Wherever there is no TPU."""
    return Machine.of(chip).interpret is not False


def gather(
    op: Operation, plan: Plan, moved: jax.Array, others: Sequence[jax.Array | None]
) -> tuple[jax.Array, ...]:
    """`y_i = G(x) . w_i`, in the kernel or, of what has no form, after it."""
    if not plan.lanes:
        return _products(op, moved, others)
    made = _arranged(op, plan)
    letters, first = op.terms[0].spec.lhs, next((form for form in made.forms if form), None)
    rows, rest = (first.rows, first.summed) if first else _split(op, letters)
    inside = [(x, form, w) for x, form, w in zip(op.terms, made.forms, others, strict=True) if form]
    right = [
        (_other(form.columns, form, x, w), weights, x.out.dtype)
        for (x, form, w), weights in zip(inside, made.weights, strict=True)
    ]
    operand = flat(moved, letters, rows, rest)
    machine, outside = Machine.current(), None in made.forms
    ys, gathered = all_gather(machine, made.ring, operand, right, whole=outside)
    size = [sizes(op, x, op.shard_size * op.t) for x in op.terms]
    whole = unflat(gathered, rows + rest, size[0], letters) if outside else moved
    found = iter(ys)
    return tuple(
        unflat(next(found), form.rows + form.columns, size[i], x.spec.out)
        if form
        else _product(op, x, whole, w)
        for i, (x, form, w) in enumerate(zip(op.terms, made.forms, others, strict=True))
    )


def scatter(
    op: Operation, plan: Plan, lhs: Sequence[jax.Array], rhs: Sequence[jax.Array | None]
) -> jax.Array:
    """`y = S(sum_i x_i . w_i)`, the sum made in the kernel or, if it has no form, before it."""
    if not plan.lanes:
        return sum_of_products(op, lhs, rhs).astype(op.terms[0].out.dtype)
    return _scattered(op, plan, lhs, rhs, None)[0]


def carries(op: Operation, lanes: tuple[Lane, ...]) -> bool:
    """Whether a scatter's kernel of these lanes can carry what the gather `op` moves: all its
    products need the whole of it, and there are semaphores for its hops."""
    contracted = all(op.letter not in term.spec.out for term in op.terms)
    return contracted and 2 * len(lanes) * steps(lanes) <= ROOM


def carry(
    op: Operation,
    plan: Plan,
    lhs: Sequence[jax.Array],
    rhs: Sequence[jax.Array | None],
    beside: Operation,
    moved: jax.Array,
    others: Sequence[jax.Array | None],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`scatter`, and the `gather` beside it, whose operand the same kernel carries."""
    made = _arranged(beside, plan)
    letters = beside.terms[0].spec.lhs
    rows, rest = _split(beside, letters)
    passenger = Passenger(made.ring, flat(moved, letters, rows, rest))
    y, gathered = _scattered(op, plan, lhs, rhs, passenger)
    assert gathered is not None
    size = sizes(beside, beside.terms[0], beside.shard_size * beside.t)
    whole = unflat(gathered, rows + rest, size, letters)
    return y, _products(beside, whole, others)


def _scattered(
    op: Operation,
    plan: Plan,
    lhs: Sequence[jax.Array],
    rhs: Sequence[jax.Array | None],
    carried: Passenger | None,
) -> tuple[jax.Array, jax.Array | None]:
    """A scatter's result, and the rows of all devices of what its kernel carried."""
    out = op.terms[0].out
    made = _arranged(op, plan)
    letters, first = op.terms[0].spec.out, made.forms[0]
    rows, columns = (first.rows, first.columns) if first else _split(op, letters)
    left, right = [], []
    for x, form, weights, a, b in zip(op.terms, made.forms, made.weights, lhs, rhs, strict=False):
        assert form is not None and b is not None
        moved, other = (b, a) if form.swapped else (a, b)
        side = (x.spec.rhs or "") if form.swapped else x.spec.lhs
        left.append(flat(moved, side, rows, form.summed).astype(weights.dtype))
        right.append((_other(columns, form, x, other).astype(weights.dtype), weights))
    if first is None:
        left.append(flat(sum_of_products(op, lhs, rhs), letters, rows, columns))
    assert made.tiles is not None
    y, gathered = reduce_scatter(
        Machine.current(),
        made.ring,
        made.tiles,
        left,
        right,
        wire=op.travelling.dtype,
        out=out.dtype,
        carried=carried,
    )
    y = unflat(y, rows + columns, sizes(op, op.terms[0], op.shard_size), letters)
    return y, gathered


def _split(op: Operation, letters: str) -> tuple[str, str]:
    """The rows and the columns of what has no form: the moved letter, and all others."""
    return op.letter, letters.replace(op.letter, "")


def _arranged(op: Operation, plan: Plan) -> Arrangement:
    made = arranged(op, plan.lanes, Machine.current())
    assert isinstance(made, Arrangement), made  # `unsupported` has said why not
    return made


def _products(
    op: Operation, whole: jax.Array, others: Sequence[jax.Array | None]
) -> tuple[jax.Array, ...]:
    """Of a gathered operand."""
    return tuple(_product(op, x, whole, w) for x, w in zip(op.terms, others, strict=True))


def _product(op: Operation, term: Term, x: jax.Array, w: jax.Array | None) -> jax.Array:
    return product(term.spec, x, w, term.out, op.precision).astype(term.out.dtype)


def _other(columns: str, form: Form, term: Term, w: jax.Array | None) -> jax.Array:
    """The operand that does not move, [k, n] or, where it lies so already, [n, k]."""
    assert w is not None
    letters = term.spec.lhs if form.swapped else term.spec.rhs or ""
    if form.transposed(term, columns):
        return flat(w, letters, columns, form.summed)
    return flat(w, letters, form.summed, columns)

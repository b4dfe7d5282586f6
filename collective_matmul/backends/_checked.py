"""Any backend, with a column checksum of everything that it computes: `backend="xla+checked"`.

Links and memory flip bits that nothing notices. With weights `r` of random signs, a product obeys

    sum_m r_m y[m, n]  =  sum_k (sum_m r_m x[m, k]) w[k, n],

and the right side costs a vector instead of a matrix: the sum over a shard's rows crosses the axis
by a plain collective, not by the hops of the schedule. So a payload that was damaged on its way, or
a product that was computed wrong, makes the two sides differ by more than rounding does, and the
device that sees it spoils its result with NaN: a trainer that skips steps with NaN skips this one.

Cost, of a product of [m, k] and [k, n]: 4 (m k + m n) + 4 k n FLOPs beside 2 m k n, the operands
and the result read once more, and two collectives of k (or n) numbers.

Rounding is let pass, as much as eight times

    u(result) |y| + ((K + M + t) u(acc) + sqrt(t) u(wire) + u(products)) (|y| + |x||w|)

where u are unit roundoffs, |.| norms over the M summed rows (roots of sums of squares) and K is the
contracted size. The errors of rows, which the signs decorrelate, add up as a random walk does. A
change below that is not seen: in bfloat16, of rows that carry less than some percent of a column.

Reference: Huang and Abraham, Algorithm-Based Fault Tolerance for Matrix Operations, 1984;
Freivalds, Probabilistic Machines Can Use Less Running Time, 1977 (the weights).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from collective_matmul.hardware import Chip
from collective_matmul.lanes import Lane
from collective_matmul.operation import Operation, Plan, Term, accumulation_dtype

if TYPE_CHECKING:
    from collective_matmul.backends import Backend

SUFFIX = "+checked"
SLACK = 8.0
PASSES = 2.0**-8  # how TPUs and GPUs round float32 before they multiply it, unless told otherwise


class Checked:
    """A backend whose results are checked.

    Args:
      base: what runs the operations.
    """

    def __init__(self, base: Backend) -> None:
        self.base = base
        self.decomposes = base.decomposes
        self.accumulates = getattr(base, "accumulates", False)
        self.margin = getattr(base, "margin", 0.0)

    def unsupported(self, op: Operation, lanes: tuple[Lane, ...], chip: Chip) -> str | None:
        """Why an operation cannot be run and checked, or None."""
        if not all(jnp.issubdtype(term.out.dtype, jnp.floating) for term in op.terms):
            return "checked results are spoiled with NaN, which only floating dtypes have"
        if op.of_vmap:
            return "the checksum crosses the axis by lax.psum, which needs an axis of a mesh"
        for term in op.terms:
            if not any(_sides([term])):
                return f"'{term.spec}' has no free letter to sum over"
        if op.kind == "scatter" and not any(_sides(op.terms)):
            return "the terms of the scatter have no free letter in common to sum over"
        return self.base.unsupported(op, lanes, chip)

    def interpreted(self, chip: Chip) -> bool:
        """Where the base's are."""
        base: Any = self.base
        return bool(base.interpreted(chip))

    def walked(self, op: Operation, plan: Plan, chip: Chip) -> tuple[float, float]:
        """What the base takes."""
        base: Any = self.base
        seconds: tuple[float, float] = base.walked(op, plan, chip)
        return seconds

    def gather(
        self, op: Operation, plan: Plan, moved: jax.Array, others: Sequence[jax.Array | None]
    ) -> tuple[jax.Array, ...]:
        """`y_i = G(x) . w_i`, each checked."""
        results = self.base.gather(op, plan, moved, others)
        return tuple(
            _spoiled(y, _gather_differs(op, term, moved, other, y))
            for term, other, y in zip(op.terms, others, results, strict=True)
        )

    def scatter(
        self, op: Operation, plan: Plan, lhs: Sequence[jax.Array], rhs: Sequence[jax.Array | None]
    ) -> jax.Array:
        """`y = S(sum_i x_i . w_i)`, checked."""
        y = self.base.scatter(op, plan, lhs, rhs)
        return _spoiled(y, _scatter_differs(op, lhs, rhs, y))


def _spoiled(y: jax.Array, differs: jax.Array) -> jax.Array:
    return jnp.where(differs, jnp.full((), jnp.nan, y.dtype), y)


def _sides(terms: Sequence[Term]) -> tuple[str, str]:
    """The letters to sum over: those free in every left operand; or else in every right one."""
    out = terms[0].spec.out
    left = [x for x in out if all(x in t.spec.lhs and x not in (t.spec.rhs or "") for t in terms)]
    right = [x for x in out if all(x not in t.spec.lhs for t in terms)]
    return "".join(left), "" if left else "".join(right)


def _gather_differs(
    op: Operation, term: Term, moved: jax.Array, other: jax.Array | None, y: jax.Array
) -> jax.Array:
    spec, (left, right) = term.spec, _sides([term])
    whole = dict(zip(spec.out, term.out.shape, strict=True))
    weights = {x: _weights(x, whole[x]) for x in left + right}
    local = dict(weights)
    if op.letter in left:
        local[op.letter] = _own(op, weights[op.letter], 0)
    letters, sums = _summed(spec.lhs, left, moved, local)
    if op.letter in left:
        sums = [lax.psum(x, op.axis_name) for x in sums]
    else:
        at = letters.index(op.letter)
        sums = [lax.all_gather(x, op.axis_name, axis=at, tiled=True) for x in sums]
    found = _multiplied(term, letters, sums, right, other, weights)
    return _differs(op, [term], left + right, found, _summed(spec.out, left + right, y, weights)[1])


def _scatter_differs(
    op: Operation, lhs: Sequence[jax.Array], rhs: Sequence[jax.Array | None], y: jax.Array
) -> jax.Array:
    left, right = _sides(op.terms)
    out = op.terms[0].spec.out
    whole = dict(zip(out, op.terms[0].out.shape, strict=True))
    whole[op.letter] *= op.t
    weights = {x: _weights(x, whole[x]) for x in left + right}
    total: list[jax.Array] = []
    for term, x, w in zip(op.terms, lhs, rhs, strict=True):
        letters, sums = _summed(term.spec.lhs, left, x, weights)
        more = _multiplied(term, letters, sums, right, w, weights)
        total = [a + b for a, b in zip(total, more, strict=True)] if total else more
    total = [lax.psum(x, op.axis_name) for x in total]
    local = dict(weights)
    if op.letter in left + right:
        local[op.letter] = _own(op, weights[op.letter], 0)
    letters, actual = _summed(out, left + right, y, local)
    if op.letter in left + right:
        actual = [lax.psum(x, op.axis_name) for x in actual]
    else:
        total = [_own(op, x, letters.index(op.letter)) for x in total]
    return _differs(op, op.terms, left + right, total, actual)


def _weights(letter: str, size: int) -> jax.Array:
    """Of either sign, and of several sizes, so that rows that swap places show; always the same."""
    rng = np.random.default_rng([ord(letter), size])
    return jnp.asarray(rng.choice([-1.0, 1.0], size) * rng.uniform(0.5, 1.5, size), jnp.float32)


def _own(op: Operation, x: jax.Array, dim: int) -> jax.Array:
    """This device's shard of what all devices hold whole."""
    size = x.shape[dim] // op.t
    return lax.dynamic_slice_in_dim(x, lax.axis_index(op.axis_name) * size, size, dim)


def _summed(
    letters: str, over: str, x: jax.Array, weights: dict[str, jax.Array]
) -> tuple[str, list[jax.Array]]:
    """The letters that are left, the weighted sums over the others, and the sums of squares."""
    x = x.astype(accumulation_dtype(np.dtype(x.dtype)))
    over = "".join(letter for letter in letters if letter in over)
    rest = "".join(letter for letter in letters if letter not in over)
    spec = ",".join([letters, *over]) + "->" + rest
    vectors = [weights[letter].astype(x.dtype) for letter in over]
    exact = lax.Precision.HIGHEST
    return rest, [
        jnp.einsum(spec, x, *vectors, precision=exact),
        jnp.einsum(f"{letters}->{rest}", x * x, precision=exact),
    ]


def _multiplied(
    term: Term,
    letters: str,
    sums: list[jax.Array],
    right: str,
    other: jax.Array | None,
    weights: dict[str, jax.Array],
) -> list[jax.Array]:
    """What `_summed` should give of the result."""
    rest = "".join(x for x in term.spec.out if x in letters or x in (term.spec.rhs or ""))
    rest = "".join(x for x in rest if x not in right)
    if other is None or term.spec.rhs is None:
        return [jnp.einsum(f"{letters}->{rest}", x) for x in sums]
    own, factors = _summed(term.spec.rhs, right, other, weights)
    dtype = jnp.result_type(sums[0].dtype, factors[0].dtype)
    return [
        jnp.einsum(
            f"{letters},{own}->{rest}",
            x.astype(dtype),
            w.astype(dtype),
            precision=lax.Precision.HIGHEST,
        )
        for x, w in zip(sums, factors, strict=True)
    ]


def _differs(
    op: Operation,
    terms: Sequence[Term],
    over: str,
    expected: list[jax.Array],
    actual: list[jax.Array],
) -> jax.Array:
    """Whether any column's sums differ by more than rounding lets them."""
    out = terms[0].out
    sizes = dict(zip(terms[0].spec.out, out.shape, strict=True))
    if op.kind == "scatter":
        sizes[op.letter] *= op.t
    acc = accumulation_dtype(terms[0].lhs.dtype, out.dtype)
    summed = math.prod(sizes[x] for x in over) + sum(map(_contracted, terms)) * op.t + op.t
    wire = op.travelling.dtype if op.kind == "scatter" else acc
    rounded = jax.default_backend() != "cpu" and acc.itemsize == 4 and op.precision is None
    relative = summed * _unit(acc) + math.sqrt(op.t) * _unit(wire) + (PASSES if rounded else 0.0)
    dtype = jnp.result_type(expected[0].dtype, actual[0].dtype)
    there, here = ([x.astype(dtype) for x in side] for side in (expected, actual))
    norm, inner = jnp.sqrt(here[1]), jnp.sqrt(there[1])
    bound = SLACK * (_unit(out.dtype) * norm + relative * (norm + inner))
    # A number so large that its square is infinite, where the operands have none, is damage too.
    huge = jnp.isfinite(there[1]) & ~jnp.isfinite(here[1])
    return jnp.any((jnp.abs(here[0] - there[0]) > bound) | huge)


def _contracted(term: Term) -> int:
    sizes = zip(term.spec.lhs, term.lhs.shape, strict=True)
    return math.prod(size for letter, size in sizes if letter not in term.spec.out)


def _unit(dtype: np.dtype) -> float:
    return float(jnp.finfo(dtype).eps) / 2

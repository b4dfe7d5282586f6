"""Any einsum as what the kernels multiply: rows by columns, `[rows, k] . [k, columns]`.

A product is of that form if the moved letter is free: its rows are the moved letter and whatever
else is free beside it. Rows of a shard then lie together, and so do those of a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax import lax

from collective_matmul.operation import Operation, Term


class Form(NamedTuple):
    """Letters of a product.

    Args:
      rows: the moved letter, then what else is free in its operand.
      summed: what is contracted.
      columns: what is free in the other operand.
      swapped: the moved letter is in the right operand.
    """

    rows: str
    summed: str
    columns: str
    swapped: bool

    @classmethod
    def of(cls, term: Term, letter: str) -> Form | None:
        """The form of a product, or None if it has none."""
        lhs, rhs = term.spec.lhs, term.spec.rhs or ""
        roles = {x: term.spec.role(x) for x in lhs + rhs}
        if term.rhs is None or "batch" in roles.values() or roles[letter] != "free":
            return None
        swapped = letter in rhs
        side, other = (rhs, lhs) if swapped else (lhs, rhs)
        rows = letter + "".join(x for x in side if roles[x] == "free" and x != letter)
        summed = "".join(x for x in side if roles[x] == "contracted")
        return cls(rows, summed, "".join(x for x in other if roles[x] == "free"), swapped)

    def transposed(self, term: Term, columns: str) -> bool:
        """Whether the other operand lies as [columns, summed], the columns in this order."""
        other = term.spec.lhs if self.swapped else term.spec.rhs
        return bool(columns) and other == columns + self.summed


def sizes(op: Operation, term: Term, moved: int) -> dict[str, int]:
    """Of every letter of a term; of the moved one it is given."""
    found = dict(zip(term.spec.out, term.out.shape, strict=True))
    found |= dict(zip(term.spec.lhs, term.lhs.shape, strict=True))
    found |= dict(zip(term.spec.rhs or "", term.rhs.shape if term.rhs else (), strict=True))
    return found | {op.letter: moved}


def total(letters: str, size: Mapping[str, int]) -> int:
    """Of all the letters together."""
    return math.prod(size[x] for x in letters)


def flat(x: jax.Array, letters: str, first: str, second: str) -> jax.Array:
    """An array of `letters` as one of [first, second]."""
    x = transposed(x, letters, first + second)
    return x.reshape(math.prod(x.shape[: len(first)]), math.prod(x.shape[len(first) :]))


def unflat(x: jax.Array, order: str, size: Mapping[str, int], letters: str) -> jax.Array:
    """An array of two dimensions that are the letters of `order`, as one of `letters`."""
    return transposed(x.reshape(tuple(size[letter] for letter in order)), order, letters)


def transposed(x: jax.Array, order: str, letters: str) -> jax.Array:
    """An array whose letters are in this order, in that of `letters`."""
    return x if order == letters else lax.transpose(x, tuple(map(order.index, letters)))

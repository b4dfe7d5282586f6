"""The local products: one `dot_general` each, summed in the accumulation dtype."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from collective_matmul.operation import Operand, Operation, accumulation_dtype
from collective_matmul.spec import Spec


def product(
    spec: Spec, lhs: jax.Array, rhs: jax.Array | None, out: Operand, precision: Any
) -> jax.Array:
    """`einsum(spec, lhs, rhs)`, in the dtype in which such products are summed, not yet rounded.

    Args:
      spec: the product; without a right operand it is the (cast) left one.
      lhs: an array of the shape of the letters `spec.lhs`.
      rhs: an array of the shape of the letters `spec.rhs`, or None.
      out: the final result: its dtype has a say in the accumulation dtype, its sharding is this
        product's too. (Its shape is the whole operation's, and does not matter here.)
      precision: as in `lax.dot_general`.
    """
    if rhs is None or spec.rhs is None:
        return lhs.astype(accumulation_dtype(np.dtype(lhs.dtype), out.dtype))
    dtype = accumulation_dtype(np.dtype(lhs.dtype), np.dtype(rhs.dtype), out.dtype)
    if lhs.dtype != rhs.dtype:  # a wide cotangent meets a narrow operand
        lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
    if _dot_order(spec) != spec.out == _dot_order(spec.swapped()):
        spec, lhs, rhs = spec.swapped(), rhs, lhs
        precision = swapped_precision(precision)
    assert spec.rhs is not None
    contracted, batch = (
        (tuple(map(spec.lhs.index, letters)), tuple(map(spec.rhs.index, letters)))
        for letters in (_letters(spec, "contracted"), _letters(spec, "batch"))
    )
    order = _dot_order(spec)
    at = out.sharding
    result = lax.dot_general(
        lhs,
        rhs,
        (contracted, batch),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=None if at is None else P(*(at[spec.out.index(x)] for x in order)),
    )
    if order == spec.out:
        return result
    return lax.transpose(result, tuple(map(order.index, spec.out)))


def sum_of_products(
    op: Operation, lhs: Sequence[jax.Array], rhs: Sequence[jax.Array | None]
) -> jax.Array:
    """`sum_i einsum(spec_i, lhs_i, rhs_i)` of a scatter's terms, in the accumulation dtype."""
    return functools.reduce(
        operator.add,
        (
            product(term.spec, left, right, term.out, op.precision)
            for term, left, right in zip(op.terms, lhs, rhs, strict=True)
        ),
    )


def swapped_precision(precision: Any) -> Any:
    """The precision of the same product with its operands exchanged."""
    return precision[::-1] if isinstance(precision, tuple) else precision


def _letters(spec: Spec, role: str) -> list[str]:
    return [letter for letter in spec.lhs if spec.role(letter) == role]


def _dot_order(spec: Spec) -> str:
    """The letters of `dot_general`'s result: batch, then free of lhs, then free of rhs."""
    free = [letter for letter in spec.lhs + (spec.rhs or "") if spec.role(letter) == "free"]
    return "".join(_letters(spec, "batch") + free)

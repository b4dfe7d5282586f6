"""How an operation is run by a kernel, or why it cannot be: its forms, panels and tiles."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from collective_matmul.backends.pallas_tpu.forms import Form, sizes, total
from collective_matmul.backends.pallas_tpu.machine import Machine
from collective_matmul.backends.pallas_tpu.ring import Ring
from collective_matmul.backends.pallas_tpu.tiles import Product, Tiles, cut, misaligned
from collective_matmul.backends.pallas_tpu.weights import Weights
from collective_matmul.lanes import Lane
from collective_matmul.operation import Operation, Term, accumulation_dtype
from collective_matmul.product import swapped_precision

DTYPES = ("bfloat16", "float32")  # that a TPU's kernel copies and multiplies here


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """One operation on one machine.

    Args:
      ring: cut into panels.
      forms: of each term; None: its product is made outside the kernel.
      weights: of each term that has a form.
      tiles: of a scatter's sum; of a gather each of the weights has its own.
    """

    ring: Ring
    forms: tuple[Form | None, ...]
    weights: tuple[Weights, ...]
    tiles: Tiles | None


def arranged(op: Operation, lanes: tuple[Lane, ...], machine: Machine) -> Arrangement | str:
    """How a kernel walks the lanes, or why none can.

    Args:
      op: over several devices, with something in a shard.
      lanes: of a schedule.
      machine: that the kernel is for.
    """
    forms = _forms(op)
    inside = [(term, form) for term, form in zip(op.terms, forms, strict=True) if form]
    unit = 1
    if inside:
        term, form = inside[0]
        unit = total(form.rows[1:], sizes(op, term, op.shard_size))
    ring = Ring(
        tuple(x for x in lanes if len(range(*x.part.bounds(op.shard_size)))),
        op.t,
        op.shard_size * unit,
        unit,
        op.axis_name,
        tuple(jax.sharding.get_abstract_mesh().axis_names),
    )
    products = [_product(op, *each) for each in inside] or [_bare(op)]
    if not machine.interpret and (reason := _refused(op, inside, ring, products)):
        return reason
    if op.kind == "gather" and not inside:  # rows go from HBM to HBM
        return Arrangement(ring, forms, (), None)
    found = cut(machine, ring, products, fine=op.kind == "scatter")
    if isinstance(found, str):
        return found
    ring, tiles = found
    columns = inside[0][1].columns if inside and op.kind == "scatter" else None
    weights = (
        Weights(
            k=product.k,
            n=product.n,
            dtype=multiplied(term),
            transposed=form.transposed(term, columns or form.columns),
            tiles=each,
            acc=summed(op),
            precision=swapped_precision(op.precision) if form.swapped else op.precision,
        )
        for (term, form), product, each in zip(inside, products, tiles, strict=False)
    )
    return Arrangement(ring, forms, tuple(weights), tiles[0])


def _forms(op: Operation) -> tuple[Form | None, ...]:
    """Of the terms that one kernel works on together. A scatter's sum is made in it, or not at all.

    What travels narrow and is multiplied wide is no product of a gather's kernel.
    """
    forms = [Form.of(term, op.letter) for term in op.terms]
    if op.kind == "gather":
        kinds = [
            (form.rows, form.summed)
            if form and term.rhs and term.lhs.dtype == term.rhs.dtype
            else None
            for form, term in zip(forms, op.terms, strict=True)
        ]
        first = next((kind for kind in kinds if kind), None)
        return tuple(
            form if kind and kind == first else None
            for form, kind in zip(forms, kinds, strict=True)
        )
    alike = {form and (frozenset(form.rows), frozenset(form.columns)) for form in forms}
    return tuple(forms) if len(alike) == 1 else (None,) * len(forms)


def multiplied(term: Term) -> np.dtype:
    """The dtype that a term's operands have when they are multiplied."""
    lhs, rhs = term.lhs.dtype, term.rhs.dtype if term.rhs else term.lhs.dtype
    return lhs if lhs == rhs else accumulation_dtype(lhs, rhs, term.out.dtype)


def summed(op: Operation) -> np.dtype:
    """The dtype in which an operation's products are summed."""
    found = (accumulation_dtype(multiplied(term), term.out.dtype) for term in op.terms)
    return np.result_type(*found)


def _product(op: Operation, term: Term, form: Form) -> Product:
    size = sizes(op, term, op.shard_size)
    written = 2 * summed(op).itemsize  # as it is made
    if op.kind == "gather":
        written += 2 * term.out.dtype.itemsize
    elif term is op.terms[0]:
        written += _of_a_sum(op)
    k, n = total(form.summed, size), total(form.columns, size)
    return Product(k, n, multiplied(term).itemsize, written)


def _bare(op: Operation) -> Product:
    """The collective alone, of rows that are the moved letter's."""
    moved = op.terms[0].lhs if op.kind == "gather" else op.terms[0].out
    n = math.prod(moved.shape) // op.shard_size
    size = moved.dtype.itemsize if op.kind == "gather" else summed(op).itemsize
    return Product(n, n, size, _of_a_sum(op), weighted=False)


def _of_a_sum(op: Operation) -> int:
    """Bytes of a number of a scatter's sum: twice arriving, twice leaving, twice made."""
    return 4 * op.travelling.dtype.itemsize + 2 * op.terms[0].out.dtype.itemsize


def _refused(
    op: Operation, inside: list[tuple[Term, Form]], ring: Ring, products: list[Product]
) -> str | None:
    """Why a TPU's kernel does not run this."""
    dtypes = {op.travelling.dtype, *(multiplied(term) for term, _ in inside)}
    dtypes |= {term.out.dtype for term, _ in inside}
    unknown = sorted(str(x) for x in dtypes if x.name not in DTYPES)
    if unknown:
        return f"its kernels know {' and '.join(DTYPES)}, not {', '.join(unknown)}"
    if op.precision is not None:
        return f"its kernels multiply at jax's default precision, not {op.precision}"
    narrowest = min(x.itemsize for x in dtypes)
    return misaligned(ring, [dataclasses.replace(x, itemsize=narrowest) for x in products])

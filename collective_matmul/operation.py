"""One collective product, normalised: what moves, what it meets, and the two duals.

Whatever the user wrote, there are two operations. A *gather* brings one operand's shards together
and multiplies it with each of several others; a *scatter* sums several products over the devices
and leaves each device its shard of the sum. Each is the other's derivative:

    y_i = G_s(x) . w_i        dx = S_s(sum_i dy_i . w_i)      dw_i = G_s(x) . dy_i
    y   = S_s(sum_i x_i . w_i)    dx_i = G_s(dy) . w_i        dw_i = G_s(dy) . x_i

so the backward pass of every operation is again made of these two, along the same letter `s`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from collective_matmul.lanes import Lane
from collective_matmul.spec import Spec, nearest_multiples, sizes_of

AxisName = str | tuple[str, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Operand:
    """Shape and dtype of one local array: hashable, so that it can choose a schedule.

    `sharding` is how axes of type Explicit that are not manual here cut the array, if there are
    any: a gradient has to be told to lie as its operand does.
    """

    shape: Shape
    dtype: np.dtype
    sharding: PartitionSpec | None = None

    @classmethod
    def of(cls, array: Any) -> Operand:
        """The operand that `array` (or anything with a shape and a dtype) is."""
        return cls(tuple(array.shape), np.dtype(array.dtype), explicit_sharding(array))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Term:
    """One product of an operation: `spec`, its operands as they lie on a device, its result.

    In a gather `lhs` is the moving shard and `out` this product's whole result; in a scatter `lhs`
    and `rhs` are what is multiplied, and `out` the shard of the sum that all terms share.
    """

    spec: Spec
    lhs: Operand
    rhs: Operand | None
    out: Operand


@dataclasses.dataclass(frozen=True)
class Operation:
    """A gather or a scatter of letter `letter` over the `t` devices of `axis_name`."""

    kind: Literal["gather", "scatter"]
    letter: str
    terms: tuple[Term, ...]
    axis_name: AxisName
    t: int
    precision: Any = None
    wire_dtype: np.dtype | None = None
    algorithm: str | None = None
    backend: str | None = None
    beside: Operation | None = None  # the other one of a gradient, which XLA may run under this one
    of_vmap: bool = False  # the axis is one of jax.vmap, not of a mesh
    partly_manual: bool = False  # the mesh has axes that are not manual here

    @property
    def travelling(self) -> Operand:
        """What one shard is on the wire: the moving operand, or a partial sum in `wire_dtype`."""
        if self.kind == "gather":
            return self.terms[0].lhs
        out = self.terms[0].out
        return Operand(out.shape, self.wire_dtype or out.dtype)

    @property
    def shard_size(self) -> int:
        """Rows of the moving letter in one device's shard."""
        term = self.terms[0]
        if self.kind == "gather":
            return term.lhs.shape[term.spec.lhs.index(self.letter)]
        return term.out.shape[term.spec.out.index(self.letter)]

    @property
    def bare(self) -> bool:
        """Whether nothing is multiplied: it is the collective alone."""
        return all(term.rhs is None for term in self.terms)

    @property
    def beside_explicit_axes(self) -> bool:
        """Whether axes that are not manual here cut the operands by type."""
        operands = (x for term in self.terms for x in (term.lhs, term.rhs, term.out))
        return any(x is not None and x.sharding is not None for x in operands)

    def dual_of_moved(self) -> Operation:
        """The scatter that turns a gather's cotangents into the moved operand's."""
        terms = tuple(
            Term(_transposed_to_lhs(term.spec), term.out, term.rhs, term.lhs) for term in self.terms
        )
        return dataclasses.replace(self, kind="scatter", terms=terms, beside=self._for_others())

    def dual_of_others(self) -> Operation | None:
        """The gather that turns a gather's cotangents into the other operands', if it has any."""
        others = self._for_others()
        return others and dataclasses.replace(others, beside=self.dual_of_moved())

    def _for_others(self) -> Operation | None:
        terms = tuple(
            Term(_transposed_to_rhs(term.spec), term.lhs, term.out, term.rhs)
            for term in self.terms
            if term.rhs is not None
        )
        if not terms:
            return None
        return dataclasses.replace(self, terms=terms, beside=None)

    def duals(self) -> tuple[Operation, ...]:
        """The operations of the gradient."""
        if self.kind == "scatter":
            return (self.dual_of_scatter(),)
        others = self.dual_of_others()
        return (self.dual_of_moved(), *((others,) if others else ()))

    def dual_of_scatter(self) -> Operation:
        """The gather whose one moving cotangent feeds every operand's gradient of a scatter."""
        lhs = (Term(_transposed_to_lhs(x.spec), x.out, x.rhs, x.lhs) for x in self.terms)
        rhs = (
            Term(Spec(x.spec.out, x.spec.lhs, x.spec.rhs), x.out, x.lhs, x.rhs)
            for x in self.terms
            if x.rhs is not None and x.spec.rhs is not None
        )
        return dataclasses.replace(self, kind="gather", terms=(*lhs, *rhs), beside=None)


def _transposed_to_lhs(spec: Spec) -> Spec:
    """`d lhs = d out . rhs`."""
    return Spec(spec.out, spec.rhs, spec.lhs)


def _transposed_to_rhs(spec: Spec) -> Spec:
    """`d rhs = lhs . d out`."""
    return Spec(spec.lhs, spec.out, spec.rhs or "")


def explicit_sharding(array: Any) -> PartitionSpec | None:
    """How the mesh axes of type Explicit cut an array, or None where there are none."""
    if not isinstance(array, jax.Array):
        return None
    sharding = jax.typeof(array).sharding
    return sharding.spec if AxisType.Explicit in sharding.mesh.axis_types else None


def accumulation_dtype(*dtypes: np.dtype) -> np.dtype:
    """The dtype in which products of these dtypes are summed.

    Floats narrower than float32 are summed in float32; wider ones, and complex numbers, in
    themselves; integers in the result's dtype, the last one given (exact modulo its range).
    """
    if not jnp.issubdtype(dtypes[-1], jnp.inexact):
        return np.dtype(dtypes[-1])
    wide = [x for x in dtypes if x.itemsize >= 4 and jnp.issubdtype(x, jnp.inexact)]
    return np.dtype(np.result_type(np.float32, *wide))


def gather_term(
    spec: Spec,
    lhs: Operand,
    rhs: Operand | None,
    letter: str,
    t: int,
    out_dtype: np.dtype,
    *,
    side: Literal["lhs", "rhs"] = "lhs",
) -> Term:
    """A term of a gather of `letter` of the operand `side`, which becomes the term's lhs.

    Raises:
      ValueError: if `letter` is not in the gathered operand, or sizes contradict.
    """
    moved = spec.lhs if side == "lhs" else spec.rhs or ""
    if letter not in moved:
        raise ValueError(
            f"cannot gather {letter!r}: {side}, the gathered operand, is {moved!r} in '{spec}'"
        )
    shape = rhs.shape if rhs else None
    sizes = sizes_of(spec, lhs.shape, shape, sharded=letter, side=side, t=t)
    out = Operand(tuple(sizes[axis] for axis in spec.out), out_dtype)
    if side == "rhs" and rhs is not None:
        return Term(spec.swapped(), rhs, lhs, out)
    return Term(spec, lhs, rhs, out)


def scatter_term(
    spec: Spec, lhs: Operand, rhs: Operand | None, letter: str, t: int, out_dtype: np.dtype
) -> Term:
    """A term of a scatter: its result is one shard of the letter.

    Raises:
      ValueError: if `letter` is not in the result or its size does not split over `t` devices.
    """
    if letter not in spec.out:
        raise ValueError(f"cannot scatter {letter!r}: the result of '{spec}' is {spec.out!r}")
    sizes = sizes_of(spec, lhs.shape, rhs.shape if rhs else None)
    if sizes[letter] % t:
        raise ValueError(
            f"'{spec}': {letter}={sizes[letter]} does not split over {t} devices; "
            f"the nearest sizes that do are {nearest_multiples(sizes[letter], t)}"
        )
    sizes[letter] //= t
    return Term(spec, lhs, rhs, Operand(tuple(sizes[axis] for axis in spec.out), out_dtype))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to run an operation: a backend and, where it decomposes, the lanes it walks.

    `fat`: contracted products wait for the whole operand and run as one product, instead of adding
    one slice's product to an accumulator at each arrival. `whole`: a scatter's product that waits
    for a sum slices its operand itself. `held`: of a fat plan, a chunk's product and copy wait for
    the chunk's before, and the fat product for them all.
    """

    backend: str
    algorithm: str | None = None
    lanes: tuple[Lane, ...] = ()
    fat: bool = False
    whole: bool = False
    held: bool = False

"""What flax's own layers take in place of `jax.lax.dot_general`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from collective_matmul import dense
from collective_matmul.layout import Layout
from collective_matmul.spec import Spec

Pairs = tuple[Sequence[int], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """`lax.dot_general` for one kind of layer; made by `dot_general`.

    Args:
      layout: where arrays lie, or None for one device.
      kind: `"column"` or `"row"`.

    Raises:
      ValueError: if kind is neither.
    """

    layout: Layout | None
    kind: Literal["column", "row"]

    def __post_init__(self) -> None:
        if self.kind not in ("column", "row"):
            raise ValueError(f"kind={self.kind!r} is neither 'column' nor 'row'")

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: tuple[Pairs, Pairs],
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """The last dimensions of lhs with the first of rhs, in the signature of `lax.dot_general`.

        Raises:
          ValueError: if other dimensions are contracted, or there are batch dimensions.
          NotImplementedError: if the result should have another dtype, or lie elsewhere.
        """
        (contracted, batch) = dimension_numbers
        pairs = sorted(zip(contracted[1], (i % lhs.ndim for i in contracted[0]), strict=True))
        n = len(pairs)
        first, last = list(range(n)), list(range(lhs.ndim - n, lhs.ndim))
        if [i for i, _ in pairs] != first or [i for _, i in pairs] != last or any(map(len, batch)):
            raise ValueError(
                f"dimension_numbers={dimension_numbers} of {lhs.shape} and {rhs.shape}: a "
                f"{self.kind}-parallel layer contracts the last dimensions of x, in order, with "
                "the first of the kernel, and has no batch dimensions; transpose first"
            )
        wanted, plural = (1, "") if self.kind == "column" else (rhs.ndim - 1, "s")
        if n != wanted or rhs.ndim < 2:
            raise ValueError(
                f"a {self.kind}-parallel layer contracts {wanted} dimension{plural} of a kernel "
                f"{rhs.shape}, not {n}: " + HIDDEN_DIMENSIONS[self.kind]
            )
        if self.layout is None:
            return lax.dot_general(
                lhs,
                rhs,
                dimension_numbers,
                precision,
                preferred_element_type,
                out_sharding=out_sharding,
            )
        if out_sharding is not None:
            raise NotImplementedError(f"out_sharding={out_sharding}: the layout says where y lies")
        if preferred_element_type is not None and jnp.dtype(preferred_element_type) != lhs.dtype:
            raise NotImplementedError(
                f"preferred_element_type={jnp.dtype(preferred_element_type)} of {lhs.dtype} "
                "operands: the result has their dtype; cast them, or set the layout's wire_dtype"
            )
        layout = self.layout
        if precision is not None:
            layout = dataclasses.replace(layout, precision=precision)
        layer = dense.column_parallel if self.kind == "column" else dense.row_parallel
        return layer(lhs, rhs, layout=layout)

    def einsum(
        self,
        spec: str,
        lhs: jax.Array,
        rhs: jax.Array,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """The same for `einsum_op=` of `nnx.Einsum`: `"bsd,dhk->bshk"` or `"bshk,hkd->bsd"`.

        Raises:
          ValueError: also if the result's letters are in another order; else as `__call__`.
          NotImplementedError: as `__call__`.
        """
        parsed = Spec.parse(spec)
        assert parsed.rhs is not None
        letters = [letter for letter in parsed.rhs if letter in parsed.lhs]
        rows = "".join(letter for letter in parsed.lhs if letter not in letters)
        out = rows + "".join(letter for letter in parsed.rhs if letter not in letters)
        if parsed.out != out:
            raise ValueError(
                f"{spec!r}: a {self.kind}-parallel layer returns the dimensions of x, then those "
                f"of the kernel: '{parsed.lhs},{parsed.rhs}->{out}'"
            )
        pairs = ([parsed.lhs.index(i) for i in letters], [parsed.rhs.index(i) for i in letters])
        return self(lhs, rhs, (pairs, ((), ())), precision, preferred_element_type, out_sharding)


HIDDEN_DIMENSIONS = {
    "column": "a [d, f, ...] kernel contracts d",
    "row": "a [f, ..., d] kernel contracts all but d",
}


def dot_general(layout: Layout | None, kind: Literal["column", "row"]) -> DotGeneral:
    """A collective matmul in the signature of `lax.dot_general`, for layers that take one.

    - linen: `Dense` and `DenseGeneral` take it as `dot_general`; `MultiHeadDotProductAttention` as
      `qkv_dot_general` (`"column"`) and `out_dot_general` (`"row"`). `linen.Einsum` takes none.
    - nnx: `Linear` and `LinearGeneral` take it as `dot_general`, `Einsum` takes its method `einsum`
      as `einsum_op`.

    Each layer gathers or scatters for itself; `column` and `row` share one collective.

    Args:
      layout: where arrays lie, or None for one device.
      kind: `"column"`: x `[..., d]` with a kernel `[d, f, ...]`; `"row"`: x `[..., f, ...]` with a
        kernel `[f, ..., d]`.

    Returns:
      A callable, equal to and hashed like any other of the same layout and kind.

    Raises:
      ValueError: if kind is neither.
    """
    return DotGeneral(layout, kind)

"""The primitive: an einsum one operand of which, or whose result, lies in shards along a mesh axis.

Call these inside `jax.shard_map` (or `jax.vmap` with an axis name), as one calls `jax.lax`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from collective_matmul.arguments import Options, axis_size, read
from collective_matmul.duality import run
from collective_matmul.operation import AxisName


def collective_einsum(
    spec: str | Sequence[str],
    lhs: jax.Array | Sequence[jax.Array],
    rhs: jax.Array | Sequence[jax.Array],
    axis_name: AxisName,
    *,
    gather_lhs: str | None = None,
    gather_rhs: str | None = None,
    scatter: str | None = None,
    algorithm: str | None = None,
    backend: str | None = None,
    preferred_element_type: Any = None,
    wire_dtype: Any = None,
    precision: Any = None,
) -> Any:
    """A two-operand einsum overlapped with the collective that it needs.

    With `G_s` the concatenation of the shards of letter `s` over `axis_name`, in the order of the
    axis index (as `lax.all_gather(tiled=True)`), and `S_s` the sum over the devices of which each
    keeps its own shard along `s` (as `lax.psum_scatter(tiled=True)`):

        gather_lhs="s":   y = einsum(spec, G_s(lhs), rhs)
        gather_rhs="s":   y = einsum(spec, lhs, G_s(rhs))
        scatter="s":      y = S_s(einsum(spec, lhs, rhs))

    For example, with `t` devices on the axis, `"mk,kn->mn"` means

        gather_lhs="m":   lhs: [m/t, k]   rhs: [k, n]     y: [m, n]     all-gather matmul
        gather_lhs="k":   lhs: [m, k/t]   rhs: [k, n]     y: [m, n]     contracting all-gather
        gather_rhs="k":   lhs: [m, k]     rhs: [k/t, n]   y: [m, n]     weight-gathered matmul
        scatter="m":      lhs: [m, k]     rhs: [k, n]     y: [m/t, n]   matmul reduce-scatter

    Error bound: with `K` the contracted size, `u` the unit roundoffs, `acc` the accumulation dtype
    (float32 for anything narrower) and `A = einsum(spec, |lhs|, |rhs|)`, summed over the devices if
    scattered,

        |y - exact| <= ((K + t) u(acc) + t u(wire) + u(result)) A   (1 + O(u))

    where the wire term is there only for a scatter over t > 1 devices whose `wire_dtype` is
    narrower than `acc`. (A ring rounds at its t - 1 hops, a plain collective each addend and sum.)

    Args:
      spec: two operands and a result, a letter each dimension; batch letters are welcome. The moved
        letter may be free, contracted or a batch letter in a gather, any letter of the result in a
        scatter. With tuples of operands, a tuple of specs or one for all.
      lhs: this device's array. A tuple where `gather_rhs` feeds several products (a tuple of
        results), or where one scatter carries the sum of several.
      rhs: likewise; a tuple with `gather_lhs` (one gather feeds them all) or `scatter`. An operand
        that is no tuple is shared by all products.
      axis_name: a manual mesh axis, or a tuple of them in mesh order, which act as their product.
      gather_lhs: the letter of lhs of which each device holds a shard.
      gather_rhs: the letter of rhs of which each device holds a shard.
      scatter: the letter of the result of which each device keeps a shard.
      algorithm: a name of `collective_matmul.algorithms`, or None for the cost model's choice.
      backend: a name of `collective_matmul.backends`, or None for the cost model's choice.
      preferred_element_type: the result's dtype, of the operands' kind; default theirs.
      wire_dtype: the dtype in which partial sums travel, here or in the gradient; default the
        result's. float32 removes the wire's rounding at twice the bytes of bfloat16.
      precision: as in `lax.dot_general`.

    Returns:
      The result's local array, or for the products of a gather of tuples, a tuple of them. It
      varies over `axis_name` and every axis that an operand varies over.

    Raises:
      ValueError: on a spec, letter, size, axis or name that does not fit, with the remedy.
      TypeError: on operands of different dtypes, or dtypes of another kind than theirs.
      NotImplementedError: if the named algorithm or backend cannot run this, saying why.

    Reference:
      Wang et al., Overlap Communication with Dependent Computation via Decomposition in Large Deep
      Learning Models, ASPLOS 2023; Dehghani et al., Scaling Vision Transformers to 22 Billion
      Parameters, 2023, section 3 (asynchronous parallel linear operations).
    """
    call = read(
        spec,
        _arrays(lhs),
        _arrays(rhs),
        axis_name,
        axis_size(axis_name),
        gather_lhs=gather_lhs,
        gather_rhs=gather_rhs,
        scatter=scatter,
        options=Options(algorithm, backend, preferred_element_type, wire_dtype, precision),
    )
    return run(call)


def all_gather_matmul(
    lhs: jax.Array,
    rhs: jax.Array | Sequence[jax.Array],
    axis_name: AxisName,
    *,
    algorithm: str | None = None,
    backend: str | None = None,
    preferred_element_type: Any = None,
    wire_dtype: Any = None,
    precision: Any = None,
) -> Any:
    """`y = all_gather(lhs) . rhs`, the gather overlapped with the product.

    The 2-D case of `collective_einsum("mk,kn->mn", ..., gather_lhs="m")`, to which the keywords and
    errors belong.

    Args:
      lhs: [m/t, k], this device's rows.
      rhs: [k, n], or a tuple of such arrays, which one gather feeds.
      axis_name: the axis over which the rows lie.
      algorithm, backend, preferred_element_type, wire_dtype, precision: as in `collective_einsum`.

    Returns:
      [m, n], or a tuple of such arrays.
    """
    options = Options(algorithm, backend, preferred_element_type, wire_dtype, precision)
    return collective_einsum("mk,kn->mn", lhs, rhs, axis_name, gather_lhs="m", **options._asdict())


def matmul_reduce_scatter(
    lhs: jax.Array | Sequence[jax.Array],
    rhs: jax.Array | Sequence[jax.Array],
    axis_name: AxisName,
    *,
    algorithm: str | None = None,
    backend: str | None = None,
    preferred_element_type: Any = None,
    wire_dtype: Any = None,
    precision: Any = None,
) -> jax.Array:
    """`y = reduce_scatter(lhs . rhs)`, the sum over the devices overlapped with the product.

    The 2-D case of `collective_einsum("mk,kn->mn", ..., scatter="m")`, to which the keywords and
    errors belong.

    Args:
      lhs: [m, k], this device's columns of the whole left operand; or a tuple of such arrays.
      rhs: [k, n], this device's rows of the whole right operand; or a tuple, paired with lhs: one
        scatter carries the sum of the products.
      axis_name: the axis to sum over and to scatter the rows along.
      algorithm, backend, preferred_element_type, wire_dtype, precision: as in `collective_einsum`.

    Returns:
      [m/t, n], this device's rows of the sum.
    """
    options = Options(algorithm, backend, preferred_element_type, wire_dtype, precision)
    result = collective_einsum("mk,kn->mn", lhs, rhs, axis_name, scatter="m", **options._asdict())
    assert isinstance(result, jax.Array)
    return result


def _arrays(operand: Any) -> Any:
    return jax.tree.map(jnp.asarray, tuple(operand) if isinstance(operand, list) else operand)

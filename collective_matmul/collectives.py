"""The bare collectives by lanes: what a shard needs when there is no product to travel beside."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from collective_matmul import stepwise
from collective_matmul.arguments import Call, axis_size, common_dtype, wire_dtype_of
from collective_matmul.duality import run
from collective_matmul.operation import (
    AxisName,
    Operand,
    Operation,
    gather_term,
    scatter_term,
)
from collective_matmul.spec import Spec
from collective_matmul.steps import Steps


def all_gather(
    x: jax.Array,
    axis_name: AxisName,
    *,
    dim: int,
    algorithm: str | None = None,
    backend: str | None = None,
    wire_dtype: Any = None,
) -> jax.Array:
    """`y = G_dim(x)`: every device's shards side by side, as `lax.all_gather(tiled=True)`.

    Its gradient is `reduce_scatter` along the same lanes. XLA may start the hops under whatever
    independent work stands beside the call: use it to fetch parameters ahead of their layer.

    Args:
      x: this device's shard.
      axis_name: the axis, or axes in mesh order, over which the shards lie.
      dim: the dimension along which to put them together.
      algorithm, backend, wire_dtype: as in `collective_einsum`.

    Returns:
      `x` with dimension `dim` made `t` times as long.

    Raises:
      ValueError, NotImplementedError: as `collective_einsum`.
    """
    op = Fetch.of(
        x, axis_name, dim=dim, algorithm=algorithm, backend=backend, wire_dtype=wire_dtype
    ).op
    result = run(Call(op, (x,), (None,), single=True))
    assert isinstance(result, jax.Array)
    return result


def reduce_scatter(
    x: jax.Array,
    axis_name: AxisName,
    *,
    dim: int,
    algorithm: str | None = None,
    backend: str | None = None,
    wire_dtype: Any = None,
) -> jax.Array:
    """`y = S_dim(x)`: the sum over the devices, a shard each, as `lax.psum_scatter(tiled=True)`.

    Args:
      x: this device's addend.
      axis_name: the axis, or axes in mesh order, to sum over.
      dim: the dimension along which to cut the sum.
      algorithm, backend, wire_dtype: as in `collective_einsum`.

    Returns:
      `x` with dimension `dim` made `t` times shorter. 16-bit sums are rounded to `wire_dtype`
      (default: their own) at each hop, and added in float32.

    Raises:
      ValueError, NotImplementedError: as `collective_einsum`.
    """
    common_dtype([x])
    t, spec = axis_size(axis_name), _spec(x, dim)
    term = scatter_term(spec, Operand.of(x), None, spec.lhs[dim], t, np.dtype(x.dtype))
    op = Operation(
        "scatter", spec.lhs[dim], (term,), axis_name, t,
        wire_dtype=wire_dtype_of(term.out.dtype, wire_dtype), algorithm=algorithm, backend=backend,
    )  # fmt: skip
    result = run(Call(op, (x,), (None,), single=True))
    assert isinstance(result, jax.Array)
    return result


@dataclasses.dataclass(frozen=True)
class Fetch:
    """`all_gather` and its gradient as journeys, for a rule of one's own that puts them somewhere.

    Args:
      op: the bare gather; see `of`.
    """

    op: Operation

    @classmethod
    def of(
        cls,
        x: Any,
        axis_name: AxisName,
        *,
        dim: int,
        algorithm: str | None = None,
        backend: str | None = None,
        wire_dtype: Any = None,
    ) -> Fetch:
        """The fetch of arrays such as x, which may be abstract; arguments as of `all_gather`."""
        t, spec = axis_size(axis_name), _spec(x, dim)
        term = gather_term(spec, Operand.of(x), None, spec.lhs[dim], t, np.dtype(x.dtype))
        op = Operation(
            "gather", spec.lhs[dim], (term,), axis_name, t,
            wire_dtype=wire_dtype_of(term.out.dtype, wire_dtype), algorithm=algorithm,
            backend=backend,
        )  # fmt: skip
        return cls(op)

    @property
    def result(self) -> Operand:
        """Shape and dtype of the whole."""
        return self.op.terms[0].out

    def arrive(self, x: jax.Array) -> Steps[Any]:
        """What arrives of all shards, by steps."""
        return stepwise.arrive(self.op, x)

    def whole(self, arrived: Any) -> jax.Array:
        """What arrived, put together."""
        return stepwise.assembled(self.op, arrived)

    def total(self, dy: jax.Array) -> Steps[jax.Array]:
        """The gradient: this device's shard of the sum of all dy, by steps."""
        return stepwise.scatter(self.op.dual_of_moved(), (dy,), (None,))


def _spec(x: Any, dim: int) -> Spec:
    if not isinstance(dim, int):
        raise TypeError(f"dim is the number of a dimension, got {dim!r}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim={dim} is out of range for an array of shape {x.shape}")
    letters = "abcdefghijklmnopqrstuvwxyz"[: x.ndim]
    return Spec(letters, None, letters)

"""Single collective products as programs: every mode, forward or with its gradient.

`m`, `k` and `n` are the sizes of the product that one device computes, `t` the devices on the axis:

    gather               lhs: [m/t, k]   rhs: [k, n]     y: [m, n]
    gather-contracting   lhs: [m, k/t]   rhs: [k, n]     y: [m, n]
    gather-rhs           lhs: [m, k]     rhs: [k/t, n]   y: [m, n]
    scatter              lhs: [m, k]     rhs: [k, n]     y: [m/t, n]

Every group of `t` devices of the slice does the same, each with arrays of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.flops import count_jaxpr
from bench.predicted.programs import Program
from bench.work import Work, hardware_work
from collective_matmul import collective_einsum, explain
from collective_matmul.explain import Explanation

SPEC = "mk,kn->mn"


class Mode(NamedTuple):
    """Which letter moves, and the dimension of lhs, rhs and y that the axis cuts, if any."""

    moves: dict[str, str]
    lhs: int | None
    rhs: int | None
    out: int | None


MODES = {
    "gather": Mode({"gather_lhs": "m"}, 0, None, None),
    "gather-contracting": Mode({"gather_lhs": "k"}, 1, None, None),
    "gather-rhs": Mode({"gather_rhs": "k"}, None, 0, None),
    "scatter": Mode({"scatter": "m"}, None, None, 0),
}


@dataclasses.dataclass(frozen=True)
class Product:
    """One collective product.

    Args:
      mode: one of `MODES`.
      m, k, n: sizes of the product of one device.
      dtype: of the operands.
      grad: whether both operands' gradients are computed beside the result.
      returned: the program returns what it makes, which then is none of its temporary memory.

    Raises:
      ValueError: if there is no such mode, or a size is not positive.
    """

    mode: str
    m: int
    k: int
    n: int
    dtype: str = "bfloat16"
    grad: bool = False
    returned: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"no mode {self.mode!r}; there are {', '.join(MODES)}")
        if min(self.m, self.k, self.n) < 1:
            raise ValueError(f"m={self.m}, k={self.k}, n={self.n} must be at least 1")

    def shapes(self, t: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Of one device: lhs, rhs and result.

        Raises:
          ValueError: if the size that is cut does not split over `t` devices.
        """
        mode = MODES[self.mode]
        whole = ((self.m, self.k), (self.k, self.n), (self.m, self.n))
        names = ("mk", "kn", "mn")
        cut = []
        for letters, shape, dim in zip(names, whole, (mode.lhs, mode.rhs, mode.out), strict=True):
            if dim is not None and shape[dim] % t:
                raise ValueError(f"{letters[dim]}={shape[dim]} does not split over {t} devices")
            cut.append(tuple(size // t if i == dim else size for i, size in enumerate(shape)))
        lhs, rhs, out = cut
        return lhs, rhs, out  # type: ignore[return-value]

    def explained(self, t: int, chip: Any) -> Explanation:
        """What the cost model chooses for it, and why."""
        lhs, rhs, _ = (jax.ShapeDtypeStruct(x, jnp.dtype(self.dtype)) for x in self.shapes(t))
        return explain(SPEC, lhs, rhs, axis_size=t, chip=chip, **MODES[self.mode].moves)

    def program(self, mesh: Mesh, algorithm: str | None, backend: str | None) -> Program:
        """The product over the mesh axis "tensor".

        Args:
          mesh: with the axes of `make_mesh`.
          algorithm, backend: as in `collective_einsum`.

        Raises:
          ValueError, NotImplementedError: as `collective_einsum`.
        """
        moves = MODES[self.mode].moves

        def multiply(lhs: jax.Array, rhs: jax.Array) -> Any:
            return collective_einsum(
                SPEC, lhs, rhs, "tensor", algorithm=algorithm, backend=backend, **moves
            )

        return self._program(mesh, multiply, self.shapes(mesh.shape["tensor"]))

    def bare(self, mesh: Mesh) -> Program:
        """The product alone: every device has whole operands, and nothing moves."""
        return self._program(mesh, lambda lhs, rhs: jnp.einsum(SPEC, lhs, rhs), self.shapes(1))

    def _program(self, mesh: Mesh, multiply: Callable[..., Any], shapes: Any) -> Program:
        lhs, rhs, out = shapes

        def run(lhs: jax.Array, rhs: jax.Array, cotangent: jax.Array) -> Any:
            results = made(lhs, rhs, cotangent)
            if self.returned:
                return results
            return jax.tree.map(_corner, lax.optimization_barrier(results))

        def made(lhs: jax.Array, rhs: jax.Array, cotangent: jax.Array) -> Any:
            if not self.grad:
                return multiply(lhs, rhs)
            y, gradients = jax.vjp(multiply, lhs, rhs)
            # As in a model, gradients begin once the result is there, from what was kept: else one
            # pass's collectives hide under the other's products, and what both gather is gathered
            # once. All that passes is used, for a barrier lets what is not used fall away.
            y, gradients, cotangent = lax.optimization_barrier((y, gradients, cotangent))
            return y, gradients(cotangent)

        # Every device has its own rows of every array, so that nothing but the mode moves.
        every = P(mesh.axis_names)
        arrays = [
            jax.ShapeDtypeStruct(
                (mesh.size * rows, columns),
                jnp.dtype(self.dtype),
                sharding=NamedSharding(mesh, every),
            )
            for rows, columns in (lhs, rhs, out)
        ]
        mapped = jax.shard_map(run, mesh=mesh, in_specs=every, out_specs=every)
        traced = jax.jit(mapped).trace(*arrays)
        products = 3 if self.grad else 1
        flops = 2 * self.m * self.k * self.n * products * mesh.size
        return Program(
            traced=traced,
            mesh=mesh,
            model=Work(flops, "model", f"{products} bare product{'s' * (products > 1)} a device"),
            hardware=hardware_work(count_jaxpr(traced.jaxpr)),
            dtype=self.dtype,
        )


def _corner(made: jax.Array) -> jax.Array:
    """Of what is made, so much that it must be made: as in a model, whose program does not return
    it. What a communicating kernel makes has a place of its own, and to be returned is copied from
    there: 128 of 1,261 us for 16,384 x 6,144 x 2,688 gathered over 16 devices of v6e."""
    return made[:8, :128]

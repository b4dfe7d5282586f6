"""What the suites time: each product of `predicted.operations` by each plan, on real devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import collective_matmul as cm
from bench.measured.bounds import Bound, bound
from bench.predicted.operations import Product
from bench.predicted.slices import chip_of
from bench.work import Work

PLAIN = ("unfused", None)  # the plan that all others are compared with


def axis_sizes(*, quick: bool) -> list[int]:
    """The powers of two from 2 that the devices give; the largest of them alone if `quick`."""
    sizes = [2**i for i in range(1, 11) if 2**i <= len(jax.devices())]
    return sizes[-1:] if quick else sizes


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product over the first `t` devices."""

    product: Product
    t: int

    @property
    def row(self) -> dict[str, Any]:
        """What the problem is, for a table; sizes are of the product of one device."""
        product = self.product
        return {
            "operation": product.mode,
            "m x k x n": f"{product.m} x {product.k} x {product.n}",
            "dtype": product.dtype,
            "devices": self.t,
            "pass": "forward+backward" if product.grad else "forward",
        }

    def work(self) -> Work:
        """FLOPs of all devices together, as the plain collective multiplies."""
        return self.product.program(_mesh(self.t), PLAIN[1], PLAIN[0]).hardware

    def bound(self) -> Bound | None:
        """The least time on the devices there are, or None where they have no peak."""
        chip = chip_of(jax.devices())
        told = self.product.explained(self.t, chip)
        return bound(told, self.work().flops / self.t, backward=self.product.grad, chip=chip)


@functools.lru_cache(maxsize=2)
def program(problem: Problem, backend: str, algorithm: str | None) -> Callable[[], Any]:
    """The problem by one plan, compiled, on operands that lie where they belong.

    Raises:
      NotImplementedError: if the plan cannot run the problem, with the reason.
    """
    traced = problem.product.program(_mesh(problem.t), algorithm, backend).traced
    compiled = traced.lower().compile()
    (places, _), operands = compiled.input_shardings, []
    keys = jax.random.split(jax.random.key(0), len(places))
    for key, place, local in zip(keys, places, problem.product.shapes(problem.t), strict=True):
        # Random ones: a product of zeros takes less power, and so less time.
        make = functools.partial(
            jax.random.normal,
            shape=(problem.t * local[0], local[1]),
            dtype=jnp.dtype(problem.product.dtype),
        )
        operands.append(jax.jit(make, out_shardings=place)(key))
    return functools.partial(compiled, *operands)


@functools.cache
def _mesh(t: int) -> jax.sharding.Mesh:
    return cm.make_mesh(tensor=t, devices=jax.devices()[:t])

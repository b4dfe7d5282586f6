"""Calling a kernel that talks to other devices: what all of them are called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from collective_matmul.backends.pallas_tpu.machine import LIMIT, PLANNED, Machine
from collective_matmul.backends.pallas_tpu.ring import Ring, collective_id, peers


def like(x: jax.Array, shape: Sequence[int], dtype: np.dtype) -> jax.ShapeDtypeStruct:
    """A result that varies over the devices as x does."""
    return jax.ShapeDtypeStruct(
        tuple(shape),
        dtype,
        manual_axis_type=jax.typeof(x).manual_axis_type,
        sharding=NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec()),
    )


def kernel_call(
    body: Callable[..., None],
    machine: Machine,
    ring: Ring,
    name: str,
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    *,
    cores: int,
    cost: pl.CostEstimate,
    told: dict[str, str],
) -> Sequence[jax.Array]:
    """Runs a kernel once on each core.

    Args:
      body: of references: scalars about the peers, the operands and results where they lie in HBM,
        and scratch.
      machine: that the kernel is for.
      ring: along which it talks.
      name: of the kernel in a profile.
      operands, results, scratch: see `body`.
      cores: that run it.
      cost: what it declares.
      told: metadata.
    """
    where_it_lies = pl.BlockSpec(memory_space=pltpu.HBM)
    call = pl.pallas_call(
        body,
        grid=(cores,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *(where_it_lies for _ in operands)],
        out_specs=[where_it_lies for _ in results],
        # Said of the types too, or the compiler may find a place on chip, where no peer can write.
        out_shape=[pltpu.HBM.like(each) for each in results],
        scratch_shapes=list(scratch),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            collective_id=collective_id(ring),
            vmem_limit_bytes=int(machine.vmem / PLANNED * LIMIT),
            # 110 of a tile's 4,095 bundles on v4. The interpreter, which raises, checks in tests.
            disable_bounds_checks=True,
        ),
        cost_estimate=cost,
        interpret=machine.interpret,
        name=name,
        metadata=told,
    )
    found: Sequence[jax.Array] = call(peers(ring), *operands)
    return found

"""The real training step of a model, as a program for devices that need not be there.

It is the step that `models.train` runs, traced for arrays that are only described: nothing is
allocated, and what is compiled is what would train.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench.flops import count, count_jaxpr
from bench.work import Work, hardware_work, model_work
from collective_matmul import Layout
from models import step, vit
from models.config import Config
from models.optim import Optim


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to predict.

    Args:
      traced: `jax.jit(f).trace(*args)`.
      mesh: the devices that it is for.
      model: the FLOPs that its result needs, on all devices together.
      hardware: the FLOPs that it multiplies, likewise.
      dtype: of its products' operands.
      tokens: that a run of it works through; 0 if it knows no tokens.
    """

    traced: Any
    mesh: jax.sharding.Mesh
    model: Work
    hardware: Work
    dtype: str
    tokens: int = 0


def vit_step(model: vit.Config, layout: Layout, batch: int) -> Program:
    """`training_step` of a model by the default recipe, as long as ViT-22B's.

    Args:
      model: what is trained.
      layout: where arrays lie, and what moves them.
      batch: images of a step, on all devices.
    """
    data, fsdp, tensor = layout.mesh.axis_sizes
    config = Config(
        model=model,
        optim=Optim(),
        steps=177_000,  # the schedule's numbers do not change what is compiled
        batch=batch,
        mesh=(data, fsdp, tensor),
    )
    return training_step(config, layout)


def training_step(config: Config, layout: Layout) -> Program:
    """One update of the parameters: forward, backward, optimiser.

    Args:
      config: the run; `batch` images of `config.model.image_shape`, float32, and their labels.
      layout: where arrays lie, and what moves them.

    Raises:
      ValueError: if the mesh is an abstract one.
      ValueError, NotImplementedError: as `models.step.abstract`.
    """
    mesh = layout.mesh
    if not isinstance(mesh, jax.sharding.Mesh):
        raise ValueError(f"{mesh} names no devices to compile for; use make_mesh(devices=...)")
    graph, state = step.abstract(config, layout)
    over = NamedSharding(mesh, P(layout.data))
    shape = (config.batch, *config.model.image_shape, config.model.channels)
    batch: Any = {
        "image": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=over),
        "label": jax.ShapeDtypeStruct((config.batch,), jnp.int32, sharding=over),
    }
    traced = step.jitted_training(graph, step.usual(config), state).trace(state, batch)
    return Program(
        traced=traced,
        mesh=mesh,
        model=trained_work(config.model, config.batch),
        hardware=hardware_work(count_jaxpr(traced.jaxpr)),
        dtype=config.model.dtype,
        tokens=config.batch * config.model.grid[0] * config.model.grid[1],
    )


@functools.cache
def trained_work(model: vit.Config, batch: int) -> Work:
    """Model FLOPs of a training step: 3 times the forward pass, on one device and without remat.

    Args:
      model: which model.
      batch: images.
    """
    plain = dataclasses.replace(model, remat=None)

    def forward(images: jax.Array) -> Any:
        return vit.ViT(plain, layout=None, rngs=nnx.Rngs(0))(images)

    shape = (batch, *model.image_shape, model.channels)
    return model_work(count(forward, jax.ShapeDtypeStruct(shape, jnp.float32)))

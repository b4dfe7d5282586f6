"""What a training run carries from step to step, and how it begins: every array made in its place.

Between the collective matmuls of the model, where arrays lie is the compiler's business. What
enters and leaves a step is placed here: the parameters as the modules say, the optimiser's moments
and the average of the parameters as their parameters, all else on every device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from collective_matmul import Layout, nn
from models import accumulate, ema, guard, optim, start, vit
from models.config import Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step changes.

    Args:
      step: how many steps were made, whether or not their updates were applied; an int32 scalar.
      params: nested dictionaries of arrays, each as an ordinary Dense layer has it.
      moments: the optimiser's state.
      ema: the average of the parameters, as params, or None where the config keeps none.
      guard: what is remembered of good and bad steps.
    """

    step: jax.Array
    params: dict[str, Any]
    moments: optax.OptState
    ema: dict[str, Any] | None
    guard: guard.GuardState

    @property
    def averaged(self) -> dict[str, Any]:
        """The parameters to evaluate and to deploy: their average where there is one."""
        return self.params if self.ema is None else self.ema


def abstract(config: Config, layout: Layout | None) -> tuple[Any, State]:
    """The model's graph, and the state's shapes, dtypes and places: nothing is allocated.

    Args:
      config: the run.
      layout: where arrays lie, or None for one device.

    Returns:
      What `train_step` and `eval_step` take as `graph`, and a state of `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError, NotImplementedError: if sizes do not split over the mesh, or the algorithm or
        backend is unknown or cannot run the model.
    """
    accumulate.check(config.batch, config.optim.accumulate, layout)
    rows = config.batch // config.optim.accumulate
    shape = (rows, *config.model.image_shape, config.model.channels)

    def called() -> vit.ViT:
        model = _model(config, layout)
        model(jnp.zeros(shape))  # the layers name what does not split over the mesh
        return model

    module = nnx.eval_shape(called)
    graph, variables = nnx.split(module)
    params = nnx.to_pure_dict(variables)
    state: State = jax.eval_shape(lambda params: _begin(config, params), params)
    if layout is None:
        return graph, state
    mesh = layout.mesh
    whole = NamedSharding(mesh, P())
    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), nnx.to_pure_dict(nn.partition_specs(module))
    )
    of_moments = optax.tree.map_params(
        optim.optimizer(config.optim, config.steps),
        lambda _, place: place,
        state.moments,
        places,
        transform_non_params=lambda _: whole,
    )
    of_state: Any = State(
        step=whole,  # type: ignore[arg-type]
        params=places,
        moments=of_moments,
        ema=None if state.ema is None else places,
        guard=jax.tree.map(lambda _: whole, state.guard),
    )
    return graph, jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, of_state
    )


def create(config: Config, layout: Layout | None) -> tuple[Any, State]:
    """The model's graph, and the state before the first step, every array of it made in place.

    Args:
      config: the run. One seed gives the same values on every mesh; `start` says whether they are
        drawn from it, or read.
      layout: where arrays lie, or None for one device.

    Returns:
      As `abstract`, with arrays.

    Raises:
      ValueError, NotImplementedError: as `abstract`.
      FileNotFoundError, ValueError: if what to start from is not there, or is of another model.
    """
    graph, described = abstract(config, layout)
    if config.start.path is None:
        params = nnx.to_pure_dict(nnx.state(nn.create(lambda: _model(config, layout))))
    else:
        params = start.params(config.start, config.model, described.params)
    if layout is None:
        return graph, _begin(config, params)
    places = jax.tree.map(lambda x: x.sharding, described)
    return graph, jax.jit(lambda params: _begin(config, params), out_shardings=places)(params)


def _begin(config: Config, params: dict[str, Any]) -> State:
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        moments=optim.optimizer(config.optim, config.steps).init(params),
        ema=ema.begin(config.optim.ema, params),
        guard=guard.begin(),
    )


def _model(config: Config, layout: Layout | None) -> vit.ViT:
    return vit.ViT(config.model, layout=layout, rngs=nnx.Rngs(config.seed))

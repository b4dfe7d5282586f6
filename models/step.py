"""What a training run repeats: functions of (state, batch), the same on one device and on many.

Between the collective matmuls of the model, where arrays lie is the compiler's business. What
enters and leaves a step is placed here: the parameters as the modules say, the optimiser's moments
as their parameters, the batch over the data axes. Several processes run the same code: each brings
the rows of the batch that its devices hold.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from collective_matmul import Layout, nn
from models import optim, vit
from models.config import Config
from models.data import Batch
from models.loss import classify

Metrics = dict[str, jax.Array]
Placed = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step changes.

    Args:
      step: how many updates were made, an int32 scalar.
      params: nested dictionaries of arrays, each as an ordinary Dense layer has it.
      moments: the optimiser's state.
    """

    step: jax.Array
    params: dict[str, Any]
    moments: optax.OptState


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
    # What does not split over the mesh is named by the layers, which a trace calls first.
    shape = (config.batch, *config.model.image_shape, config.model.channels)
    nnx.eval_shape(lambda: _model(config, layout)(jnp.zeros(shape)))
    module = nnx.eval_shape(lambda: _model(config, layout))
    graph, variables = nnx.split(module)
    params = nnx.to_pure_dict(variables)
    optimizer = optim.optimizer(config.optim, config.steps)
    moments = jax.eval_shape(optimizer.init, params)
    state = State(jax.ShapeDtypeStruct((), jnp.int32), params, moments)  # type: ignore[arg-type]
    if layout is None:
        return graph, state
    mesh = layout.mesh
    whole = NamedSharding(mesh, P())
    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), nnx.to_pure_dict(nn.partition_specs(module))
    )
    of_moments = optax.tree.map_params(
        optimizer, lambda _, place: place, moments, places, transform_non_params=lambda _: whole
    )
    return graph, jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        state,
        State(whole, places, of_moments),  # type: ignore[arg-type]
    )


def create(config: Config, layout: Layout | None) -> tuple[Any, State]:
    """The model's graph, and the state before the first step, every array of it made in place.

    Args:
      config: the run. One seed gives the same values on every mesh.
      layout: where arrays lie, or None for one device.

    Returns:
      As `abstract`, with arrays.

    Raises:
      ValueError, NotImplementedError: as `abstract`.
    """
    graph, described = abstract(config, layout)
    params = nnx.to_pure_dict(nnx.state(nn.create(lambda: _model(config, layout))))
    optimizer = optim.optimizer(config.optim, config.steps)

    def begin(params: Any) -> State:
        return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    if layout is None:
        return graph, begin(params)
    places = jax.tree.map(lambda x: x.sharding, described)
    return graph, jax.jit(begin, out_shardings=places)(params)


def _model(config: Config, layout: Layout | None) -> vit.ViT:
    return vit.ViT(config.model, layout=layout, rngs=nnx.Rngs(config.seed))


def train_step(
    state: State, batch: Placed, *, graph: Any, config: Config, places: Any
) -> tuple[State, Metrics]:
    """One update.

    Args:
      state: before it.
      batch: "image": [b@data, height, width, channels], "label": [b@data].
      graph: from `create`.
      config: the run.
      places: where the parameters lie, a tree of shardings. The gradients are put there too, once,
        or else the parameters and both of their moments would be after the update.

    Returns:
      The state after it, and of the batch: "loss" and "accuracy" before the update, and what the
      update used, "gradient_norm" before clipping and "learning_rate". All float32 scalars.
    """

    def objective(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graph, params)(batch["image"])
        loss, correct, count = classify(logits, batch["label"], config.loss)
        return loss / count, correct / count

    (loss, accuracy), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    grads = jax.lax.with_sharding_constraint(grads, places)
    optimizer = optim.optimizer(config.optim, config.steps)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of a count
        updates, moments = optimizer.update(grads, state.moments, state.params)
    metrics = {
        "loss": loss,
        "accuracy": accuracy,
        "gradient_norm": optax.tree.norm(grads),
        "learning_rate": optim.reciprocal_sqrt(config.optim, config.steps)(state.step),
    }
    return State(state.step + 1, optax.apply_updates(state.params, updates), moments), metrics


def eval_step(
    params: Any, batch: Placed, *, graph: Any, config: Config
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the labelled rows of a batch: loss, correct answers, rows; see `loss.classify`."""
    logits = nnx.merge(graph, params)(batch["image"])
    return classify(logits, batch["label"], config.loss)


def jitted_training(graph: Any, config: Config, state: State) -> Any:
    """`train_step(state, batch)`, which consumes the state; the new one lies where the old did.

    Args:
      graph, state: from `create` or `abstract`.
      config: the run.
    """
    places = jax.tree.map(lambda x: x.sharding, state)
    step = functools.partial(train_step, graph=graph, config=config, places=places.params)
    return jax.jit(step, donate_argnums=0, out_shardings=(places, places.step))


def compile_training(graph: Any, config: Config, state: State, batch: Placed) -> Any:
    """`jitted_training`, compiled for arrays that lie as these do."""
    return jitted_training(graph, config, state).lower(state, batch).compile()


def compile_evaluation(graph: Any, config: Config, state: State, batch: Placed) -> Any:
    """`eval_step(params, batch)`."""
    step = functools.partial(eval_step, graph=graph, config=config)
    whole = state.step.sharding
    return jax.jit(step, out_shardings=whole).lower(state.params, batch).compile()


def rows_held(layout: Layout | None, batch: int) -> np.ndarray:
    """Which rows of a global batch this process has to bring: their numbers, [rows].

    Raises:
      ValueError: if the batch does not split: over the data axes, and in the classifier over the
        tensor axis as well.
    """
    if layout is None:
        return np.arange(batch)
    data, tensor = layout.size(layout.data), layout.size(layout.tensor)
    if batch % (data * tensor):
        raise ValueError(
            f"batch={batch} does not split over data x tensor = {data} x {tensor} devices, as the "
            f"classifier cuts it; choose a multiple of {data * tensor}"
        )
    place = NamedSharding(layout.mesh, P(layout.data))
    held = place.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for index in held if index]))


def place(batch: Batch, layout: Layout | None) -> Placed:
    """A batch on the devices, its rows over the data axes.

    Args:
      batch: {name: [rows, ...]}, the rows that `rows_held` says.
      layout: where arrays lie, or None for one device.
    """
    if layout is None:
        return {name: jax.device_put(rows) for name, rows in batch.items()}
    over = NamedSharding(layout.mesh, P(layout.data))
    return {
        name: jax.make_array_from_process_local_data(over, rows) for name, rows in batch.items()
    }

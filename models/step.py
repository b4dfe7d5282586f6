"""What a training run repeats: functions of (state, batch), the same on one device and on many.

`models.state` says what a state is and where its arrays lie, `models.placing` how a batch comes to
the devices. Several processes run the same code: each brings the rows of the batch that its devices
hold.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from collective_matmul import compiler_options
from models import accumulate, ema, guard, optim, statistics
from models.config import Config
from models.loss import classify, counted
from models.placing import Placed, place, rows_held
from models.state import State, abstract, create

__all__ = [
    "State",
    "Metrics",
    "Placed",
    "abstract",
    "create",
    "place",
    "rows_held",
    "train_step",
    "eval_step",
    "jitted_training",
    "variants",
    "usual",
    "observed",
    "compile_training",
    "compile_evaluation",
]

Metrics = dict[str, jax.Array]


def train_step(
    state: State, batch: Placed, *, graph: Any, config: Config, places: Any
) -> tuple[State, Metrics]:
    """One step: an update, unless the guard finds that it must not be made.

    Args:
      state: before it.
      batch: "image": [b@data, height, width, channels], "label": as in `loss.classify`.
      graph: from `create`.
      config: the run.
      places: where the parameters lie, a tree of shardings, or None for one device. The gradients
        are put there too, once, or else the parameters and both of their moments would be after the
        update.

    Returns:
      The state after it, and float32 scalars of the batch: "loss" and "accuracy" before the update,
      "gradient_norm" before clipping, "learning_rate"; whether the update was made, "applied", and
      how many in a row and in all were not, "bad_streak" and "skipped". With `config.statistics`
      also those of `models.statistics`.
    """
    (loss, accuracy), noted, grads = gradients(
        state.params, batch, graph=graph, config=config, places=places
    )
    norm = optax.tree.norm(grads)
    ok = guard.good(config.guard, state.guard, loss, norm)
    remembered = guard.advance(config.guard, state.guard, ok, loss)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of a count
        updates, moments = optim.optimizer(config.optim, config.steps).update(
            grads, state.moments, state.params, step=state.step
        )
    params = optax.apply_updates(state.params, updates)
    average = ema.update(config.optim.ema, state.ema, params, state.step + 1 - remembered.skipped)
    params, moments, average = guard.choose(
        ok, (params, moments, average), (state.params, state.moments, state.ema)
    )
    metrics = {
        "loss": loss,
        "accuracy": accuracy,
        "gradient_norm": norm,
        "learning_rate": optim.learning_rate(config.optim, config.steps)(state.step),
        "applied": ok.astype(jnp.float32),
        "bad_streak": remembered.bad_streak.astype(jnp.float32),
        "skipped": remembered.skipped.astype(jnp.float32),
    }
    if config.statistics:
        metrics |= statistics.attention(noted) | statistics.gradients(grads)
    return State(state.step + 1, params, moments, average, remembered), metrics


def gradients(
    params: Any, batch: Placed, *, graph: Any, config: Config, places: Any
) -> tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array], Any]:
    """Loss and accuracy of a batch, what was captured, and the loss's gradients; see `train_step`.

    Returns:
      Two float32 scalars; what `statistics.attention` takes, empty without `config.statistics`; and
      the gradients as params.
    """
    rows = jnp.sum(counted(batch["label"]))

    def objective(params: Any, part: Placed) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params)
        if config.statistics:
            logits, noted = model(part["image"], capture=statistics.CAPTURE)
        else:
            logits, noted = model(part["image"]), {}
        loss, correct, _ = classify(
            logits, part["label"], config.loss, smoothing=config.optim.label_smoothing
        )
        return loss / rows, (correct / rows, jax.lax.stop_gradient(noted))

    def constrain(grads: Any) -> Any:
        return grads if places is None else jax.lax.with_sharding_constraint(grads, places)

    return accumulate.value_and_grad(
        objective, params, batch, parts=config.optim.accumulate, constrain=constrain
    )


def eval_step(
    params: Any, batch: Placed, *, graph: Any, config: Config
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the labelled rows of a batch: loss, correct answers, rows; see `loss.classify`."""
    logits = nnx.merge(graph, params)(batch["image"])
    return classify(logits, batch["label"], config.loss)


def variants(config: Config) -> dict[bool, Config]:
    """The programs that a run needs: without statistics, the usual one, and with them.

    Args:
      config: the run; `statistics=1` needs no other program than the one with them.
    """
    usual = {} if config.statistics == 1 else {False: dataclasses.replace(config, statistics=0)}
    return usual | ({True: config} if config.statistics else {})


def usual(config: Config) -> Config:
    """The config of the program that most steps run."""
    return next(iter(variants(config).values()))


def observed(config: Config, number: int) -> bool:
    """Whether step `number` runs the program with statistics."""
    return config.statistics > 0 and number % config.statistics == 0


def jitted_training(graph: Any, config: Config, state: State) -> Any:
    """`train_step(state, batch)`, which consumes the state; the new one lies where the old did.

    Args:
      graph, state: from `create` or `abstract`.
      config: the run.
    """
    places = jax.tree.map(lambda x: x.sharding, state)
    of_params, mesh = None, None
    if places.step is not None:
        of_params, mesh = places.params, getattr(places.step, "mesh", None)
    step = functools.partial(train_step, graph=graph, config=config, places=of_params)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(places, places.step),
        compiler_options=compiler_options(mesh),
    )


def compile_training(graph: Any, config: Config, state: State, batch: Placed) -> Any:
    """`jitted_training`, compiled for arrays that lie as these do."""
    return jitted_training(graph, config, state).lower(state, batch).compile()


def compile_evaluation(graph: Any, config: Config, state: State, batch: Placed) -> Any:
    """`eval_step(params, batch)`."""
    step = functools.partial(eval_step, graph=graph, config=config)
    whole = state.step.sharding
    return jax.jit(step, out_shardings=whole).lower(state.params, batch).compile()

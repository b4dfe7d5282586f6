"""The optimiser of ViT-22B's public recipe, with its reciprocal square root schedule.

Reference: google-research/vmoe `get_optimizer_rsqrt_config` ("as in the ViT 22b paper"): Adam,
clipping by the global norm, weight decay decoupled from the gradient, multiplied by the learning
rate, and a hundred times as strong in the head as in the body. The schedules are those of
google-research/big_vision `utils.create_learning_rate_schedule`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Optim:
    """The recipe's numbers, as ViT-22B was trained.

    Args:
      lr: the learning rate at the end of the warm-up.
      warmup: steps over which it rises from 0.
      timescale: it falls as 1 / sqrt(1 + steps since the warm-up / timescale). Of rsqrt alone.
      cooldown: steps at the end over which it also falls linearly to 0. Of rsqrt alone.
      b1, b2, eps: Adam's averages, and what keeps its division finite; b1 is momentum's too.
      clip: the largest global norm of the gradients.
      decay_body, decay_head: weight decay of the kernels below the head, and of the head's.
      name: "adam"; or "momentum", the sum of gradients that fades by b1, as big_vision fine-tunes.
      schedule: "rsqrt", or "cosine" from the warm-up's end to 0.
      ema: keep an average of the parameters too, which fades by this at each step, such as 0.9999.
      accumulate: the batch goes through the model in so many parts, one after the other, and their
        gradients make one update. It saves memory and changes nothing else.
      label_smoothing: this share of each target is spread over all classes, in training.

    Raises:
      ValueError: if a word is unknown, or a number makes no sense.
    """

    lr: float = 1e-3
    warmup: int = 10_000
    timescale: int = 10_000
    cooldown: int = 50_000
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    decay_body: float = 0.03
    decay_head: float = 3.0
    name: Literal["adam", "momentum"] = "adam"
    schedule: Literal["rsqrt", "cosine"] = "rsqrt"
    ema: float | None = None
    accumulate: int = 1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for field, known in (("name", ("adam", "momentum")), ("schedule", tuple(SCHEDULES))):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} is none of {known}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate} must be at least 1")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ValueError(f"ema={self.ema} must be between 0 and 1, or None for no average")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be from 0 to below 1")


def reciprocal_sqrt(config: Optim, steps: int) -> optax.Schedule:
    """`lr * min(1, s/W) / sqrt(1 + max(0, s - W)/T) * min(1, (steps - s)/C)`, for step s.

    Args:
      config: lr, warmup W, timescale T and cooldown C.
      steps: of the whole run.
    """

    def schedule(count: Any) -> jax.Array:
        s = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum(1.0, s / config.warmup) if config.warmup else 1.0
        fall = jax.lax.rsqrt(1.0 + jnp.maximum(0.0, s - config.warmup) / config.timescale)
        end = jnp.clip((steps - s) / max(config.cooldown, 1), 0.0, 1.0)
        return config.lr * rise * fall * end

    return schedule


def cosine(config: Optim, steps: int) -> optax.Schedule:
    """`lr * min(1, s/W) * (1 + cos(pi * clip((s - W)/(steps - W), 0, 1))) / 2`, for step s.

    Args:
      config: lr and warmup W.
      steps: of the whole run.
    """

    def schedule(count: Any) -> jax.Array:
        s = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum(1.0, s / config.warmup) if config.warmup else 1.0
        done = jnp.clip((s - config.warmup) / max(steps - config.warmup, 1), 0.0, 1.0)
        return config.lr * rise * 0.5 * (1.0 + jnp.cos(jnp.pi * done))

    return schedule


SCHEDULES = {"rsqrt": reciprocal_sqrt, "cosine": cosine}


def learning_rate(config: Optim, steps: int) -> optax.Schedule:
    """The learning rate of the step with a number, from 0."""
    return SCHEDULES[config.schedule](config, steps)


def optimizer(config: Optim, steps: int) -> optax.GradientTransformationExtraArgs:
    """Clip, Adam or momentum, decay of the kernels, learning rate.

    Its `update` is told the `step`: the schedule goes by the steps of the run. A count of its own
    would fall behind by each step that is not applied, and the cooldown would not end at 0.

    Args:
      config: the recipe's numbers.
      steps: of the whole run.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        adam if config.name == "adam" else optax.trace(config.b1),
        optax.add_decayed_weights(config.decay_body, lambda params: _kernels(params, head=False)),
        optax.add_decayed_weights(config.decay_head, lambda params: _kernels(params, head=True)),
        _descend(learning_rate(config, steps)),
    )


def _descend(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """`-schedule(step) * update`."""

    def update(updates: Any, state: Any, _: Any = None, *, step: Any, **_others: Any) -> Any:
        size = -schedule(step)
        return jax.tree.map(lambda u: jnp.array(size, u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _kernels(params: Any, *, head: bool) -> Any:
    """Which parameters are kernels of the head, or of all else. Nothing but kernels decays."""

    def chosen(path: Any, _: Any) -> bool:
        names = [str(getattr(key, "key", key)) for key in path]
        return names[-1] == "kernel" and (names[0] == "head") == head

    return jax.tree_util.tree_map_with_path(chosen, params)

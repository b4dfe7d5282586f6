"""The optimiser of ViT-22B's public recipe, with its reciprocal square root schedule.

Reference: google-research/vmoe `get_optimizer_rsqrt_config` ("as in the ViT 22b paper"): Adam,
clipping by the global norm, weight decay decoupled from the gradient, multiplied by the learning
rate, and a hundred times as strong in the head as in the body. The schedule is the rsqrt of
google-research/big_vision `utils.create_learning_rate_schedule`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Optim:
    """The recipe's numbers, as ViT-22B was trained.

    Args:
      lr: the learning rate at the end of the warm-up.
      warmup: steps over which it rises from 0.
      timescale: it falls as 1 / sqrt(1 + steps since the warm-up / timescale).
      cooldown: steps at the end over which it also falls linearly to 0.
      b1, b2, eps: Adam's averages, and what keeps its division finite.
      clip: the largest global norm of the gradients.
      decay_body, decay_head: weight decay of the kernels below the head, and of the head's.
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


def reciprocal_sqrt(config: Optim, steps: int) -> optax.Schedule:
    """`lr * min(1, s/W) / sqrt(1 + max(0, s - W)/T) * min(1, (steps - s)/C)`, for s updates made.

    Args:
      config: lr, warmup W, timescale T and cooldown C.
      steps: updates in the whole run.
    """

    def schedule(count: Any) -> jax.Array:
        s = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum(1.0, s / config.warmup) if config.warmup else 1.0
        fall = jax.lax.rsqrt(1.0 + jnp.maximum(0.0, s - config.warmup) / config.timescale)
        end = jnp.clip((steps - s) / max(config.cooldown, 1), 0.0, 1.0)
        return config.lr * rise * fall * end

    return schedule


def optimizer(config: Optim, steps: int) -> optax.GradientTransformation:
    """Clip, Adam, decay of the kernels, learning rate.

    Args:
      config: the recipe's numbers.
      steps: updates in the whole run.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.decay_body, lambda params: _kernels(params, head=False)),
        optax.add_decayed_weights(config.decay_head, lambda params: _kernels(params, head=True)),
        optax.scale_by_learning_rate(reciprocal_sqrt(config, steps)),
    )


def _kernels(params: Any, *, head: bool) -> Any:
    """Which parameters are kernels of the head, or of all else. Nothing but kernels decays."""

    def chosen(path: Any, _: Any) -> bool:
        names = [str(getattr(key, "key", key)) for key in path]
        return names[-1] == "kernel" and (names[0] == "head") == head

    return jax.tree_util.tree_map_with_path(chosen, params)

"""What a bad step may do: nothing. And when many of them are reason to go back, or to give up.

A step is bad if its loss or its gradients are not finite, or, by choice, if its loss is a spike. It
then leaves parameters, moments and their average exactly as they were: the next batch meets the
model that the last good one left. That is decided on the devices, within the step, so no step waits
for the host. The host sees `bad_streak` a step later, and `decide`s from it.

A bad loss never enters the running mean that later losses are compared with. Else one NaN makes
the mean NaN, and every later step is bad until it has left the window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

Verdict = Literal["go", "rollback", "give up"]


@dataclasses.dataclass(frozen=True)
class Guard:
    """What makes a step bad, and what follows from bad ones.

    Args:
      spike: a loss above this many times the running mean is a spike, and its step is bad. None:
        only what is not finite is bad.
      window: how many steps the running mean remembers, roughly.
      patience: how many bad steps in a row are reason to go back to a checkpoint.
      rollbacks: how often to go back before giving up, in the whole run.
      skip_batches: how many batches are left out after the last bad one when going back. What made
        the trouble often lies in the data together with the state (Chowdhery et al. 2022, arXiv
        2204.02311, section 5.1, skipped 200 to 500).

    Raises:
      ValueError: if these are no such numbers.
    """

    spike: float | None = None
    window: int = 100
    patience: int = 5
    rollbacks: int = 3
    skip_batches: int = 100

    def __post_init__(self) -> None:
        if self.spike is not None and not self.spike > 1.0:
            raise ValueError(f"spike={self.spike} must be above 1, or None for no such limit")
        for name, least in (("window", 1), ("patience", 1), ("rollbacks", 0), ("skip_batches", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuardState:
    """What a run remembers of its good and bad steps; it is saved with the rest of the state.

    Args:
      total, weight: sums over the good steps of their losses and of 1, older ones fading; float32
        scalars. Their ratio is the running mean.
      bad_streak: bad steps since the last good one, an int32 scalar.
      skipped: all bad steps so far, an int32 scalar.
    """

    total: jax.Array
    weight: jax.Array
    bad_streak: jax.Array
    skipped: jax.Array


def begin() -> GuardState:
    """Before the first step."""
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return GuardState(total=zero, weight=jnp.copy(zero), bad_streak=none, skipped=jnp.copy(none))


def good(config: Guard, state: GuardState, loss: jax.Array, norm: jax.Array) -> jax.Array:
    """Whether the update may be made, a boolean scalar.

        finite(loss) and finite(norm) and loss <= spike * total / weight

    Args:
      config: the policy.
      state: of the steps before; without a good one among them no loss is a spike.
      loss: of the batch, a float32 scalar.
      norm: the global norm of the gradients, a float32 scalar. It is not finite if a single number
        of any gradient, on any device, is not.
    """
    fine = jnp.isfinite(loss) & jnp.isfinite(norm)
    if config.spike is None:
        return fine
    return fine & ((loss * state.weight <= config.spike * state.total) | (state.weight == 0.0))


def advance(config: Guard, state: GuardState, ok: jax.Array, loss: jax.Array) -> GuardState:
    """The state after a step that was good (`ok`) or bad, with this loss."""
    keep = 1.0 - 1.0 / config.window
    return GuardState(
        total=jnp.where(ok, keep * state.total + loss, state.total),
        weight=jnp.where(ok, keep * state.weight + 1.0, state.weight),
        bad_streak=jnp.where(ok, 0, state.bad_streak + 1),
        skipped=jnp.where(ok, state.skipped, state.skipped + 1),
    )


def choose(ok: jax.Array, new: Any, old: Any) -> Any:
    """The new tree after a good step, bit for bit the old one after a bad step."""
    return jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)


def decide(config: Guard, metrics: Mapping[str, float], rollbacks: int) -> Verdict:
    """What the loop does after a step, from numbers that every process has alike.

    Args:
      config: the policy.
      metrics: of the step, fetched; "bad_streak" is looked at.
      rollbacks: how often the run went back already. The loop counts; the count outlives restarts
        if it is saved beside the state.

    Returns:
      "go" on; "rollback" to a checkpoint and go on with the batch `resume_at`; or "give up".
    """
    if metrics["bad_streak"] < config.patience:
        return "go"
    return "rollback" if rollbacks < config.rollbacks else "give up"


def resume_at(config: Guard, batch: int) -> int:
    """The number of the first batch after a rollback that batch number `batch` was reason for."""
    return batch + 1 + config.skip_batches


def report(config: Guard, metrics: Mapping[str, float], rollbacks: int, step: int) -> str:
    """Why a run goes back or gives up after `step` steps, in a sentence; arguments of `decide`."""
    streak, norm = int(metrics["bad_streak"]), metrics["gradient_norm"]
    limit = "" if config.spike is None else f", or the loss above {config.spike:g} x its mean"
    return (
        f"the last {streak} steps up to step {step} were not applied (loss or gradients not finite"
        f"{limit}): loss {metrics['loss']:g}, gradient norm {norm:g}, learning rate "
        f"{metrics['learning_rate']:.3g}; {int(metrics['skipped'])} skipped in the whole run, "
        f"{rollbacks} of {config.rollbacks} rollbacks made"
    )

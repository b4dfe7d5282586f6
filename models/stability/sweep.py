"""The same small model trained at many learning rates and seeds, with and without QK-norm.

All runs of one kind are one program: `jax.vmap` of a scan over the trainer's own step, so they see
the same batches and differ in nothing but learning rate and seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from models import data, step
from models.config import Config

QKNorm = Literal["ln", "rms"]
LOGIT, ENTROPY = "attention/logit_max", "attention/entropy_min"


class Run(TypedDict):
    """One run. The curves have `points` values, each the mean over as many steps.

    Two of them are the extremes of these steps instead: the largest logit and the least entropy.
    """

    qk_norm: str | None
    lr: float
    seed: int
    steps: int
    final_loss: float
    final_accuracy: float
    logit_max: float
    entropy_min: float
    skipped: int
    loss: list[float]
    logits: list[float]
    entropy: list[float]


def sweep(
    config: Config,
    *,
    lrs: Sequence[float],
    seeds: Sequence[int],
    qk_norms: Sequence[QKNorm | None] = (None, "rms"),
    points: int = 50,
) -> list[Run]:
    """Trains every combination.

    Args:
      config: of a run on digits and one device; its learning rate, seed and QK-norm are replaced.
      lrs: learning rates.
      seeds: of the initial parameters. Batches are drawn from the config's own.
      qk_norms: kinds of norm, None for none.
      points: how many values a curve has; they divide the steps.

    Raises:
      ValueError: if the points do not divide the steps.
    """
    if config.steps % points:
        raise ValueError(f"steps={config.steps} do not split into points={points}")
    config = dataclasses.replace(config, statistics=1)
    batches = _batches(config)
    rates, numbers = (x.ravel() for x in np.meshgrid(lrs, np.arange(len(seeds)), indexing="ij"))
    runs: list[Run] = []
    for qk_norm in qk_norms:
        style = dataclasses.replace(config.model.style, qk_norm=qk_norm)
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, style=style))
        found = _train(changed, rates.astype(np.float32), numbers, seeds, batches)
        for i, (lr, number) in enumerate(zip(rates.tolist(), numbers.tolist(), strict=True)):
            curves = {name: values[i] for name, values in found.items()}
            runs.append(_run(qk_norm, lr, seeds[number], curves, points))
    return runs


def _train(
    config: Config,
    lrs: np.ndarray,
    numbers: np.ndarray,
    seeds: Sequence[int],
    batches: dict[str, jax.Array],
) -> dict[str, np.ndarray]:
    """The metrics of every step of every run: {name: [runs, steps]}."""
    graph, _ = step.abstract(config, None)
    states = [step.create(dataclasses.replace(config, seed=seed), None)[1] for seed in seeds]
    start = jax.tree.map(lambda *x: jnp.stack(x), *states)

    def train(lr: Any, number: jax.Array) -> Any:
        optim = dataclasses.replace(config.optim, lr=lr)
        run = dataclasses.replace(config, optim=optim)

        def one(state: step.State, batch: step.Placed) -> tuple[step.State, step.Metrics]:
            return step.train_step(state, batch, graph=graph, config=run, places=None)

        return jax.lax.scan(one, jax.tree.map(lambda x: x[number], start), batches)[1]

    metrics: dict[str, np.ndarray] = jax.device_get(jax.jit(jax.vmap(train))(lrs, numbers))
    return metrics


def _batches(config: Config) -> dict[str, jax.Array]:
    """What the steps see, one after the other: "image" [steps, b, 8, 8, 1], "label" [steps, b]."""
    images = data.digits()[0]
    made = [
        data.train_batch(images, config.batch, config.data.augment, seed=config.seed, step=number)
        for number in range(config.steps)
    ]
    return {name: jnp.stack([batch[name] for batch in made]) for name in ("image", "label")}


def _run(
    qk_norm: str | None, lr: float, seed: int, curves: dict[str, np.ndarray], points: int
) -> Run:
    """One run's numbers, rounded to what is worth keeping."""
    steps = len(curves["loss"])
    last = slice(-max(steps // 10, 1), None)

    def rounded(x: Any) -> Any:
        return [float(f"{value:.4g}") for value in np.atleast_1d(x)]

    parts = {name: values.reshape(points, -1) for name, values in curves.items()}
    return Run(
        qk_norm=qk_norm,
        lr=lr,
        seed=seed,
        steps=steps,
        final_loss=rounded(np.mean(curves["loss"][last]))[0],
        final_accuracy=rounded(np.mean(curves["accuracy"][last]))[0],
        logit_max=rounded(np.max(curves[LOGIT]))[0],
        entropy_min=rounded(np.min(curves[ENTROPY]))[0],
        skipped=int(curves["skipped"][-1]),
        loss=rounded(np.mean(parts["loss"], axis=1)),
        logits=rounded(np.max(parts[LOGIT], axis=1)),
        entropy=rounded(np.min(parts[ENTROPY], axis=1)),
    )

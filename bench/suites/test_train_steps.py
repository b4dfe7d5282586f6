"""Training steps of small vision transformers, and their forward pass, by every schedule."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import collective_matmul as cm
from bench.flops import count
from bench.measured.bounds import Bound
from bench.plans import plan_name, plans
from bench.predicted.slices import chip_of
from bench.suites.operations import axis_sizes
from bench.work import Work, pass_work
from collective_matmul import hardware
from models import step, vit
from models.config import Config
from models.optim import Optim

GSPMD = "gspmd"  # the same arrays by sharding constraints alone; every collective XLA's choice
ON_ACCELERATORS: dict[str, dict[str, Any]] = {"S/16": {}, "B/16": {}}
ON_CPUS: dict[str, dict[str, Any]] = {
    "mu/4": {"image_size": 16, "num_classes": 10, "dtype": "float32"}
}
IMAGES = 64  # of a device, on accelerators


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every model on every axis size by every schedule; on one device without a mesh."""
    quick, on_cpu = metafunc.config.getoption("quick"), jax.default_backend() == "cpu"
    names = [plan_name(*plan) for plan in plans(chip_of(jax.devices()))] + [GSPMD]
    sized = [(t, name) for t in axis_sizes(quick=quick) for name in names] or [(1, "one device")]
    cases = [
        pytest.param(model, t, name, trains, id=f"{model}-{t}-{name}-{_pass(trains)}")
        for model in (ON_CPUS if on_cpu else ON_ACCELERATORS)
        for t, name in sized
        for trains in (False, True)
    ]
    metafunc.parametrize("model, t, schedule, trains", cases)


def test_step(timed: Callable[..., None], model: str, t: int, schedule: str, trains: bool) -> None:
    """A schedule's step, by turns with that of the plain collectives."""
    config = _config(model, t)
    try:
        ours = _program(config, t, schedule, trains)
    except (NotImplementedError, ValueError) as reason:  # heads that do not split over t
        pytest.skip(str(reason))
    chip = chip_of(jax.devices())
    peak = hardware.peak(chip, config.model.dtype)
    work = _work(config, trains)
    timed(
        {
            "model": f"ViT {model}",
            "images": config.batch,
            "dtype": config.model.dtype,
            "devices": t,
            "pass": _pass(trains),
            "schedule": schedule,
        },
        ours,
        _program(config, t, "one device" if t == 1 else "unfused", trains),
        work=work,
        bound=Bound(work.flops / (t * peak), 0.0) if peak else None,
        devices=t,
        dtype=config.model.dtype,
    )


def _pass(trains: bool) -> str:
    return "train step" if trains else "forward"


def _config(model: str, t: int) -> Config:
    on_cpu = jax.default_backend() == "cpu"
    changes = ON_CPUS[model] if on_cpu else ON_ACCELERATORS[model]
    return Config(
        model=vit.variant(model, parallel=True, style=vit.VIT_22B, **changes),
        optim=Optim(lr=1e-3, warmup=10, timescale=100, cooldown=10),
        steps=1000,
        batch=8 if on_cpu else IMAGES * t,
    )


class _Training:
    """A compiled step and the state that it goes on from: each call is the next update."""

    def __init__(self, run: Callable[..., Any], state: step.State, batch: step.Placed) -> None:
        self.run, self.state, self.batch = run, state, batch

    def __call__(self) -> Any:
        self.state, metrics = self.run(self.state, self.batch)
        return self.state, metrics


@functools.lru_cache(maxsize=2)
def _program(config: Config, t: int, schedule: str, trains: bool) -> Callable[[], Any]:
    """The next step, or the same forward pass, at every call."""
    layout = None
    if t > 1:
        backend, _, algorithm = schedule.partition(" ")
        layout = cm.Layout(cm.make_mesh(tensor=t, devices=jax.devices()[:t]))
        named: dict[str, Any] = {"backend": backend, "algorithm": algorithm or None}
        layout = dataclasses.replace(
            layout, **({"partitioner": GSPMD} if schedule == GSPMD else named)
        )
    graph, state = step.create(config, layout)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(config.batch, *config.model.image_shape, config.model.channels))
    labels = rng.integers(0, config.model.num_classes or 1, size=config.batch)
    batch = step.place(
        {"image": images.astype(np.float32), "label": labels.astype(np.int32)}, layout
    )
    if trains:
        return _Training(step.compile_training(graph, config, state, batch), state, batch)
    evaluate = step.compile_evaluation(graph, config, state, batch)
    return functools.partial(evaluate, state.params, batch)


@functools.cache
def _work(config: Config, trains: bool) -> Work:
    """Model FLOPs of the step: 3 times the forward pass, or once."""
    graph, state = step.abstract(config, None)
    images = jax.ShapeDtypeStruct(
        (config.batch, *config.model.image_shape, config.model.channels), "float32"
    )
    labels = jax.ShapeDtypeStruct((config.batch,), "int32")
    forward = count(
        functools.partial(step.eval_step, graph=graph, config=config),
        state.params,
        {"image": images, "label": labels},
    )
    return pass_work(forward, backward=trains)

"""Bad steps: what is not finite, or a spike, changes nothing; and too many of them have an end."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models import configs, devices, guard, step
from models.guard import Guard
from models.optim import Optim

BATCH, CLASSES = 8, 10
CONFIG = dataclasses.replace(
    configs.load("digits"),
    model=dataclasses.replace(
        configs.load("digits").model, width=16, mlp_dim=32, depth=1, pool="gap"
    ),
    optim=Optim(lr=1e-2, warmup=4, timescale=10, cooldown=2, ema=0.9),
    guard=Guard(spike=4.0, window=4, patience=2, rollbacks=1, skip_batches=3),
    steps=50,
    batch=BATCH,
    mesh=(1, 1, 1),
)


def judged(losses, *, config, norms=None):
    """Which of these losses are found good, and the running mean after each."""
    state, verdicts, means = guard.begin(), [], []
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        loss = jnp.float32(loss)
        ok = guard.good(config, state, loss, jnp.float32(norm))
        state = guard.advance(config, state, ok, loss)
        verdicts.append(bool(ok))
        means.append(float(state.total / state.weight))
    return verdicts, means, state


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_what_is_not_finite_is_bad_from_the_first_step_on_and_costs_only_its_own(bad, where):
    ones = [1.0] * 6
    broken = [bad, bad, 1.0, bad, 1.0, 1.0]
    losses, norms = (broken, ones) if where == "loss" else (ones, broken)
    verdicts, means, state = judged(losses, norms=norms, config=Guard(window=16))
    assert verdicts == [False, False, True, False, True, True]
    assert means[2:] == [1.0] * 4
    assert (int(state.skipped), int(state.bad_streak)) == (3, 0)


def test_a_spike_is_bad_and_does_not_raise_what_the_next_is_compared_with():
    losses = [10.0, 3.0, 2.0, 100.0, 100.0, math.nan, 2.0]
    verdicts, means, _ = judged(losses, config=Guard(spike=3.0, window=4))
    assert verdicts == [True, True, True, False, False, False, True]
    assert means[2] == means[5] < 10.0
    assert all(judged(losses[:5], config=Guard())[0]), "without a limit finite losses are good"


def test_the_running_mean_forgets():
    """keep^k weighs a loss k steps old, keep = 1 - 1 / window."""
    _, means, _ = judged([8.0, 4.0, 2.0], config=Guard(window=4))
    np.testing.assert_allclose(means[-1], np.average([8, 4, 2], weights=[0.75**2, 0.75, 1]))


@pytest.mark.parametrize(
    "streak, rollbacks, verdict",
    [(0, 0, "go"), (1, 9, "go"), (2, 0, "rollback"), (3, 0, "rollback"), (2, 1, "give up")],
)
def test_decisions(streak, rollbacks, verdict):
    found = guard.decide(CONFIG.guard, {"bad_streak": float(streak)}, rollbacks)
    assert found == verdict


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"spike": 1.0}, "spike=1.0 must be above 1"),
        ({"spike": math.nan}, "spike=nan must be above 1"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"patience": 0}, "patience=0 must be at least 1"),
        ({"rollbacks": -1}, "rollbacks=-1 must be at least 0"),
    ],
)
def test_policies_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Guard(**changes)


def batch_of(number):
    """Images of two kinds, the kind their label, with targets for each class."""
    random = np.random.default_rng(number)
    kinds = random.integers(2, size=BATCH)
    images = random.normal(size=(BATCH, 8, 8, 1)) / 4 + (2 * kinds - 1).reshape(-1, 1, 1, 1)
    return {"image": images.astype(np.float32), "label": np.eye(CLASSES, dtype=np.float32)[kinds]}


def broken(number, value):
    """One pixel of one image is this."""
    batch = batch_of(number)
    batch["image"][BATCH // 2, 3, 3, 0] = value
    return batch


def spiking(number):
    """Every class is said to be in every image: some ten times the usual loss."""
    return batch_of(number) | {"label": np.ones((BATCH, CLASSES), np.float32)}


@functools.cache
def trainer(mesh):
    """The layout, a fresh state at each call, and the compiled step."""
    config = dataclasses.replace(CONFIG, mesh=mesh)
    layout = devices.layout_of(config)
    graph, state = step.create(config, layout)
    run = step.compile_training(graph, config, state, step.place(batch_of(0), layout))

    def fresh():
        return jax.tree.map(jnp.copy, state)

    def update(state, batch):
        state, metrics = run(state, step.place(batch, layout))
        return state, {name: float(x) for name, x in jax.device_get(metrics).items()}

    return fresh, update


def pieces(tree):
    """Every piece of every array on every device, as bytes."""
    return [
        [np.asarray(piece.data).tobytes() for piece in x.addressable_shards]
        for x in jax.tree.leaves(tree)
    ]


def learned(state):
    return pieces((state.params, state.moments, state.ema))


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 4)])
def test_a_bad_step_changes_nothing_and_the_next_is_normal(mesh):
    """The first step, one of the warm-up, and a later one, by NaN, infinity and a spike."""
    fresh, update = trainer(mesh)
    bad = {0: broken(0, np.nan), 2: broken(2, np.inf), 6: broken(6, np.nan), 7: spiking(7)}
    state, skipped, streak = fresh(), 0, 0
    for number in range(10):
        before = learned(state)
        state, metrics = update(state, bad.get(number, batch_of(number)))
        good = number not in bad
        streak = 0 if good else streak + 1
        skipped += not good
        counts = metrics["applied"], metrics["bad_streak"], metrics["skipped"]
        assert counts == (float(good), streak, skipped)
        assert (learned(state) == before) is (not good)
        assert int(state.step) == number + 1, "the counter advances in any case"
        assert math.isfinite(metrics["loss"]) is (good or number == 7)
    adam = state.moments[1]
    assert int(adam.count) == 10 - skipped
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))


def test_one_devices_piece_of_a_gradient_stops_all_devices(monkeypatch):
    """The loss is finite, and all but one piece of one kernel's gradient on one of 8 devices."""
    config = dataclasses.replace(CONFIG, mesh=(2, 1, 4))
    layout = devices.layout_of(config)
    real = step.gradients

    def poisoned(params, batch, **options):
        sums, noted, grads = real(params, batch, **options)
        place = options["places"]["encoder"]["blocks"]["mlp"]["up"]["kernel"].spec
        assert "tensor" in place[-1:], "the kernel is not cut: no device has a piece of its own"
        marked = jnp.any(batch["image"] == 77.0)

        def poison(kernel, marked):
            here = jax.lax.axis_index("tensor") == 2
            return kernel.at[0, 0, 0].set(jnp.where(marked & here, jnp.nan, kernel[0, 0, 0]))

        mlp = grads["encoder"]["blocks"]["mlp"]["up"]
        mlp["kernel"] = jax.shard_map(
            poison, mesh=layout.mesh, in_specs=(place, P()), out_specs=place
        )(mlp["kernel"], marked)
        return sums, noted, grads

    monkeypatch.setattr(step, "gradients", poisoned)
    graph, state = step.create(config, layout)
    run = step.compile_training(graph, config, state, step.place(batch_of(0), layout))
    for number, value in enumerate([0.0, 77.0, 0.0]):
        before = learned(state)
        state, metrics = run(state, step.place(broken(number, value), layout))
        metrics = {name: float(x) for name, x in metrics.items()}
        assert math.isfinite(metrics["loss"])
        assert metrics["applied"] == (value == 0.0)
        assert (learned(state) == before) is (value != 0.0)
    assert metrics["skipped"] == 1


def test_a_run_goes_back_skips_batches_and_gives_up_the_same_way_twice():
    """A loop as the trainer's, on batches of which some are bad wherever they are met."""
    fresh, update = trainer((1, 1, 1))

    def bad(number):
        return 5 <= number < 9 or number >= 14

    def run():
        state, batch, rollbacks, told = fresh(), 0, 0, []
        saved = jax.tree.map(jnp.copy, state)
        while True:
            seen = broken(batch, np.nan) if bad(batch) else batch_of(batch)
            state, metrics = update(state, seen)
            verdict = guard.decide(CONFIG.guard, metrics, rollbacks)
            told.append((int(state.step), batch, metrics["applied"], verdict))
            if verdict == "give up":
                return told, learned(state), guard.report(CONFIG.guard, metrics, rollbacks, 9)
            if verdict == "rollback":
                state, rollbacks = jax.tree.map(jnp.copy, saved), rollbacks + 1
                batch = guard.resume_at(CONFIG.guard, batch)
                continue
            if int(state.step) == 3:
                saved = jax.tree.map(jnp.copy, state)
            batch += 1

    told, end, text = run()
    assert told[5:9] == [
        (6, 5, 0.0, "go"),
        (7, 6, 0.0, "rollback"),
        (4, 10, 1.0, "go"),  # from the state of step 3, and three batches further
        (5, 11, 1.0, "go"),
    ]
    assert told[-2:] == [(8, 14, 0.0, "go"), (9, 15, 0.0, "give up")]
    assert "the last 2 steps up to step 9 were not applied" in text
    assert "1 of 1 rollbacks made" in text
    again = run()
    assert again[:2] == (told, end), "bit for bit"

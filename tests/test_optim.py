"""Schedules, decay, averages and losses, against what their equations say."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import configs, ema, optim, step
from models.encoder import REMAT
from models.loss import classify, counted
from models.optim import Optim

pytestmark = pytest.mark.slow

RECIPE = Optim(lr=1e-3, warmup=10, timescale=20, cooldown=30)


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.0),
        (5, 0.5e-3),
        (10, 1e-3),
        (30, 1e-3 / math.sqrt(2)),
        (70, 1e-3 / math.sqrt(1 + 60 / 20)),  # the cooldown begins here
        (85, 0.5e-3 / math.sqrt(1 + 75 / 20)),
        (100, 0.0),
    ],
)
def test_schedule(step, expected):
    assert float(optim.reciprocal_sqrt(RECIPE, 100)(step)) == pytest.approx(expected, abs=1e-10)


def test_schedule_without_warmup_and_cooldown():
    schedule = optim.reciprocal_sqrt(Optim(lr=1e-3, warmup=0, timescale=20, cooldown=0), 100)
    assert float(schedule(0)) == pytest.approx(1e-3)
    assert float(schedule(60)) == pytest.approx(1e-3 / 2)


def test_cosine():
    schedule = optim.cosine(Optim(lr=1e-3, warmup=10), 110)
    expected = {0: 0.0, 5: 0.5e-3, 10: 1e-3, 60: 0.5e-3, 110: 0.0}
    for at, lr in expected.items():
        assert float(schedule(at)) == pytest.approx(lr, abs=1e-10)
    assert float(schedule(35)) == pytest.approx(1e-3 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "lion"}, "name='lion' is none of"),
        ({"schedule": "linear"}, "schedule='linear' is none of"),
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"ema": 1.0}, "ema=1.0 must be between 0 and 1"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be from 0 to below 1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Optim(**changes)


def parameters(value):
    """A tree of the shapes that matter: kernels in the body and in the head, and all the rest."""
    leaf = jnp.full((2, 2), value)
    return {
        "embedding": {"kernel": leaf, "bias": leaf},
        "encoder": {"blocks": {"norm": {"scale": leaf}, "up": {"kernel": leaf, "bias": leaf}}},
        "pool": {"probe": leaf, "out": {"kernel": leaf}},
        "position": leaf,
        "head": {"kernel": leaf, "bias": leaf},
    }


def update(config, gradient, params, steps=10):
    tx = optim.optimizer(config, steps)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(gradient, tx.init(params), params, step=0)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }


def test_only_kernels_decay_and_the_head_more():
    """Without a gradient an update is -lr * decay * parameter, and nothing else."""
    config = Optim(lr=0.1, warmup=0, timescale=20, cooldown=0, decay_body=0.03, decay_head=3.0)
    found = update(config, parameters(0.0), parameters(2.0))
    decays = {"head.kernel": 3.0} | dict.fromkeys(
        ["embedding.kernel", "encoder.blocks.up.kernel", "pool.out.kernel"], 0.03
    )
    for name, leaf in found.items():
        np.testing.assert_allclose(
            leaf, -0.1 * decays.get(name, 0.0) * 2.0, rtol=1e-6, err_msg=name
        )
    assert set(decays) < set(found)


def test_decay_is_decoupled_from_the_gradient():
    """Adam's first update is lr times the gradient's sign, however large; the decay adds to it."""
    config = Optim(lr=0.1, warmup=0, timescale=20, cooldown=0, decay_body=0.5, decay_head=0.5)
    for size in (1e-3, 1.0, 1e3):
        found = update(config, parameters(size), parameters(2.0))
        np.testing.assert_allclose(found["position"], -0.1, rtol=1e-3)
        np.testing.assert_allclose(found["embedding.kernel"], -0.1 * (1 + 0.5 * 2.0), rtol=1e-3)


def test_large_gradients_are_clipped_and_small_ones_are_not():
    """The moments see gradients of a global norm of at most `clip`."""
    params = {"head": {"kernel": jnp.zeros((3, 4))}}
    tx = optim.optimizer(Optim(clip=1.0, b1=0.9), 10)
    for size in (0.1, 100.0):
        gradient = jax.tree.map(lambda x, size=size: jnp.full_like(x, size), params)
        with jax.numpy_dtype_promotion("standard"):
            _, state = tx.update(gradient, tx.init(params), params, step=0)
        (adam,) = (part for part in state if isinstance(part, optax.ScaleByAdamState))
        expected = 0.1 * min(1.0, size * math.sqrt(12))  # 1 - b1 times the norm
        assert float(optax.tree.norm(adam.mu)) == pytest.approx(expected, rel=1e-4)


def test_the_schedule_goes_by_the_steps_of_the_run():
    """Not by a count of updates: steps that are not applied would delay the cooldown."""
    config = Optim(lr=0.1, warmup=0, cooldown=50, decay_body=0.0, decay_head=0.0)
    tx, params = optim.optimizer(config, 100), {"position": jnp.zeros(3)}
    for at in (0, 60, 99):
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = tx.update({"position": jnp.ones(3)}, tx.init(params), params, step=at)
        rate = float(optim.reciprocal_sqrt(config, 100)(at))
        np.testing.assert_allclose(updates["position"], -rate, rtol=1e-5)


def test_momentum_is_the_fading_sum_of_gradients():
    config = Optim(lr=0.5, warmup=0, schedule="cosine", name="momentum", b1=0.9, decay_body=0.0)
    tx, params = optim.optimizer(config, 10**9), {"position": jnp.zeros(3)}
    state = tx.init(params)
    for expected in (0.1, 0.1 + 0.09, 0.1 + 0.09 + 0.081):
        updates, state = tx.update({"position": jnp.full(3, 0.1)}, state, params, step=0)
        np.testing.assert_allclose(updates["position"], -0.5 * expected, rtol=1e-5)


def test_the_average_begins_fast_and_then_fades_by_its_decay():
    """a + (1 - d)(p - a), d = min(decay, (1 + n) / (10 + n)) after n updates."""
    average = ema.begin(0.5, {"w": jnp.ones(2)})
    expected = 1.0
    for n, p in enumerate([3.0, 5.0, -1.0, 2.0, 7.0, 4.0, 9.0, 1.0, 0.0, 2.0], start=1):
        average = ema.update(0.5, average, {"w": jnp.full(2, p)}, jnp.int32(n))
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * p
        np.testing.assert_allclose(average["w"], expected, rtol=1e-5)
    assert d == 0.5, "the first updates had a smaller one, and the last ones not"
    assert ema.begin(None, {"w": jnp.ones(2)}) is None
    assert ema.update(None, None, {"w": jnp.ones(2)}, jnp.int32(1)) is None


LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 0.0, -2.0], [9.0, 0.0, 0.0]])
ONE_HOT = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0], [-1, -1, -1]])
SEVERAL = np.array([[1, 0, 1], [1, 0, 1], [0, 0, 0], [-1, -1, -1]])
MIXED = np.array([[0.3, 0.7, 0], [0, 0.6, 0.4], [0.5, 0.5, 0], [-1, -1, -1]])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    "targets, correct", [(ONE_HOT, 1), (SEVERAL, 1), (MIXED, 2)], ids=["one", "several", "mixed"]
)
def test_losses_of_targets(targets, correct, kind, smoothing):
    """In numpy; the last row fills the batch, and of a row without a class nothing is correct."""
    y = targets[:3].astype(float)
    if kind == "softmax":
        y = y / np.maximum(y.sum(1, keepdims=True), 1)
    y = (1 - smoothing) * y + smoothing / 3
    z = LOGITS[:3]
    if kind == "sigmoid":
        expected = (y * np.log1p(np.exp(-z)) + (1 - y) * np.log1p(np.exp(z))).sum()
    else:
        expected = -(y * (z - np.log(np.exp(z).sum(1, keepdims=True)))).sum()
    found = classify(
        jnp.float32(LOGITS), jnp.asarray(targets, jnp.float32), kind, smoothing=smoothing
    )
    np.testing.assert_allclose(found, (expected, correct, 3), rtol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_a_number_is_the_target_of_one_class(kind):
    numbers, targets = jnp.array([0, 2, 1, -1]), ONE_HOT.astype(np.float32)
    targets[2, 1] = 1.0
    logits = jnp.float32(LOGITS)
    found = classify(logits, jnp.asarray(targets), kind, smoothing=0.1)
    np.testing.assert_allclose(found, classify(logits, numbers, kind, smoothing=0.1), rtol=1e-6)
    np.testing.assert_array_equal(counted(numbers), [1, 1, 1, 0])


DIGITS = configs.load("digits")
SMALL = dataclasses.replace(
    DIGITS,
    model=dataclasses.replace(DIGITS.model, width=16, mlp_dim=32, depth=1, pool="gap"),
    optim=Optim(lr=1e-2, warmup=0, cooldown=0, ema=0.9),
    mesh=(1, 1, 1),
    batch=8,
)
RANDOM = np.random.default_rng(0)
BATCH = {
    "image": RANDOM.normal(size=(8, 8, 8, 1)).astype(np.float32),
    "label": RANDOM.integers(10, size=8).astype(np.int32),
}


@functools.cache
def parameters_of_a_model():
    """With a classifier that is not zeros, so that gradients reach what is below it."""
    _, state = step.create(SMALL, None)
    head = {"kernel": jax.random.normal(jax.random.key(1), (16, 10)), "bias": jnp.zeros(10)}
    return state.params | {"head": head}


def small(dtype="float32", remat=None, smoothing=0.0):
    """The config of a small model, its graph, and its state described."""
    model = dataclasses.replace(SMALL.model, dtype=dtype, remat=remat)
    optim = dataclasses.replace(SMALL.optim, label_smoothing=smoothing)
    config = dataclasses.replace(SMALL, model=model, optim=optim)
    return config, *step.abstract(config, None)


@functools.cache
def gradients(dtype="float32", remat=None):
    config, graph, _ = small(dtype, remat)
    run = functools.partial(step.gradients, graph=graph, config=config, places=None)
    (loss, _), _, grads = jax.jit(run)(parameters_of_a_model(), BATCH)
    return float(loss), jax.device_get(grads)


def test_bfloat16_computes_and_float32_remembers():
    """Activations round to 8 bits; parameters, gradients, moments and averages do not."""
    config, graph, state = small("bfloat16")
    run = functools.partial(step.train_step, graph=graph, config=config, places=None)
    described, _ = jax.eval_shape(run, state, BATCH)
    kept = jax.tree.leaves((described.params, described.moments, described.ema))
    assert {x.dtype for x in kept if x.ndim} == {jnp.dtype("float32")}
    half, half_grads = gradients("bfloat16")
    full, full_grads = gradients()
    assert 0.0 < abs(half - full) < 0.02 * full
    assert {x.dtype for x in jax.tree.leaves(half_grads)} == {np.dtype("float32")}
    error = optax.tree.norm(optax.tree.sub(half_grads, full_grads))
    assert 0.0 < float(error) < 0.05 * float(optax.tree.norm(full_grads))


@pytest.mark.parametrize("remat", REMAT)
def test_what_is_computed_twice_has_the_same_gradients(remat):
    loss, grads = gradients("float32", remat)
    expected, expected_grads = gradients()
    assert loss == pytest.approx(expected, rel=1e-6)
    size = float(optax.tree.norm(expected_grads))
    error = optax.tree.norm(optax.tree.sub(grads, expected_grads))
    assert float(error) < 1e-6 * size


def test_labels_are_smoothed_in_training_alone():
    config, graph, _ = small(smoothing=0.5)
    params = parameters_of_a_model()
    (smoothed, _), *_ = step.gradients(params, BATCH, graph=graph, config=config, places=None)
    plain, _ = gradients()
    assert abs(float(smoothed) - plain) > 0.01 * plain
    tested, _, rows = step.eval_step(params, BATCH, graph=graph, config=config)
    assert float(tested / rows) == pytest.approx(plain, rel=1e-5)

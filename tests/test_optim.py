"""The recipe's schedule and its weight decay, against what the equations say."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import optim
from models.optim import Optim

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
        updates, _ = tx.update(gradient, tx.init(params), params)
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
            _, state = tx.update(gradient, tx.init(params), params)
        (adam,) = (part for part in state if isinstance(part, optax.ScaleByAdamState))
        expected = 0.1 * min(1.0, size * math.sqrt(12))  # 1 - b1 times the norm
        assert float(optax.tree.norm(adam.mu)) == pytest.approx(expected, rel=1e-4)

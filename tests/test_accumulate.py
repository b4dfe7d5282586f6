"""Parts of a batch, one after the other, give the gradients of the whole."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from collective_matmul import make_mesh
from models import accumulate, configs, devices, step
from models.optim import Optim

pytestmark = pytest.mark.slow

BATCH = 16
CONFIG = dataclasses.replace(
    configs.load("digits"),
    model=dataclasses.replace(
        configs.load("digits").model, width=16, mlp_dim=32, depth=1, pool="gap"
    ),
    optim=Optim(lr=1e-2, warmup=0, timescale=10, cooldown=0),
    steps=10,
    batch=BATCH,
    mesh=(1, 1, 1),
)
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=(BATCH, 8, 8, 1)).astype(np.float32)
NUMBERS = RANDOM.integers(10, size=BATCH).astype(np.int32)
FILLED = np.where(np.arange(BATCH) % 4 == 1, -1, NUMBERS)  # one of four parts is empty
FILLED[2] = -1  # and another has fewer rows than the rest
SEVERAL = (RANDOM.random(size=(BATCH, 10)) < 0.3).astype(np.float32)
SEVERAL[5] = -1.0


def with_parts(parts, **changes):
    optim = dataclasses.replace(CONFIG.optim, accumulate=parts)
    return dataclasses.replace(CONFIG, optim=optim, **changes)


@functools.cache
def model():
    graph, state = step.create(CONFIG, None)
    # The classifier begins as zeros, and then no gradient would reach what is below it.
    kernel = jax.random.normal(jax.random.key(1), state.params["head"]["kernel"].shape)
    return graph, state.params | {"head": state.params["head"] | {"kernel": kernel}}


@functools.cache
def compiled(parts):
    graph, _ = model()
    config = with_parts(parts)
    return jax.jit(functools.partial(step.gradients, graph=graph, config=config, places=None))


def gradients(parts, label):
    """Loss, accuracy and gradients of the images with these labels."""
    _, params = model()
    sums, _, grads = compiled(parts)(params, {"image": IMAGES, "label": label})
    return jax.device_get((sums, grads))


@pytest.mark.parametrize("label", [FILLED, SEVERAL], ids=["numbers", "several"])
def test_loss_accuracy_and_gradients_are_those_of_the_whole_batch(label):
    """Also where parts have different numbers of rows that count, or none."""
    sums, grads = gradients(1, label)
    for parts in (2, 4) if label is FILLED else (4,):
        found, found_grads = gradients(parts, label)
        np.testing.assert_allclose(found, sums, rtol=1e-6)
        size = float(optax.tree.norm(grads))
        for x, y in zip(jax.tree.leaves(found_grads), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6 * size)


def test_a_mean_of_the_parts_means_would_be_another_number():
    """So the test above would notice it."""
    (whole, _), _ = gradients(1, FILLED)
    means = []
    for part in range(4):
        label = np.where(np.arange(BATCH) % 4 == part, FILLED, -1)
        if (label >= 0).any():
            means.append(gradients(1, label)[0][0])
    assert abs(np.mean(means) - whole) > 1e-3 * whole


def losses(config):
    """Of three updates, and the statistics of the last."""
    layout = devices.layout_of(config)
    batch = step.place({"image": IMAGES, "label": FILLED}, layout)
    graph, state = step.create(config, layout)
    run = step.compile_training(graph, config, state, batch)
    found = []
    for _ in range(3):
        state, metrics = run(state, batch)
        found.append(float(metrics["loss"]))
    return found, {name: float(x) for name, x in metrics.items()}


def test_updates_on_a_mesh_are_those_of_one_device():
    expected, numbers = losses(with_parts(1, statistics=1))
    found, accumulated = losses(with_parts(2, statistics=1, mesh=(2, 1, 4)))
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert expected[-1] < 0.99 * expected[0]
    assert accumulated.keys() == numbers.keys()
    for name in numbers:
        np.testing.assert_allclose(accumulated[name], numbers[name], rtol=1e-4, err_msg=name)


def test_every_device_has_its_share_of_every_part():
    """Cutting a batch moves nothing: the rows of a part lie where they lay."""
    mesh = make_mesh(data=4, tensor=2, devices=jax.devices()[:8])
    over = NamedSharding(mesh, P("data"))
    weight = jnp.ones((8, 8))

    def objective(params, part):
        rows = jnp.sum(jnp.square(part["x"] @ params), axis=-1)
        return jnp.sum(rows), (jnp.sum(rows), {"rows": rows})

    def run(params, batch):
        return accumulate.value_and_grad(
            objective, params, batch, parts=4, constrain=lambda grads: grads
        )

    x = jax.device_put(RANDOM.normal(size=(32, 8)).astype(np.float32), over)
    compiled = jax.jit(run).lower(weight, {"x": x}).compile()
    moved = re.findall(r"all-to-all|collective-permute|all-gather", compiled.as_text())
    assert not moved
    _, noted, grads = compiled(weight, {"x": x})
    np.testing.assert_allclose(grads, 2 * x.T @ x @ weight, rtol=1e-4)
    assert noted["rows"].shape == (4, 8)


@pytest.mark.parametrize(
    "batch, parts, data, tensor, message",
    [
        (10, 4, 1, 1, r"batch=10 does not split into accumulate=4 parts; .* multiple of 4"),
        (24, 2, 2, 4, r"24 / 2 = 12 rows does not split over data x tensor = 2 x 4 .* of 16"),
    ],
)
def test_batches_that_do_not_split_are_refused(batch, parts, data, tensor, message):
    config = with_parts(parts, batch=batch, mesh=(data, 1, tensor))
    with pytest.raises(ValueError, match=message):
        step.abstract(config, devices.layout_of(config))

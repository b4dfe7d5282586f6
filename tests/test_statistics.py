"""Statistics of attention and gradients are what their definitions say, and cost no memory."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import configs, devices, statistics, step, train
from models.optim import Optim

pytestmark = pytest.mark.slow

BATCH = 8
CONFIG = dataclasses.replace(
    configs.load("digits"),
    model=dataclasses.replace(configs.load("digits").model, width=16, mlp_dim=32, remat="full"),
    optim=Optim(lr=1e-2, warmup=0, timescale=10, cooldown=0),
    steps=10,
    batch=BATCH,
    mesh=(1, 1, 1),
    statistics=1,
)
RANDOM = np.random.default_rng(0)
DATA = {
    "image": RANDOM.normal(size=(BATCH, 8, 8, 1)).astype(np.float32),
    "label": RANDOM.integers(10, size=BATCH).astype(np.int32),
}
PLACES = ("block_0", "block_1", "pool")


@functools.cache
def metrics_on(mesh):
    config = dataclasses.replace(CONFIG, mesh=mesh)
    layout = devices.layout_of(config)
    graph, state = step.create(config, layout)
    batch = step.place(DATA, layout)
    run = step.compile_training(graph, config, state, batch)
    state, _ = run(state, batch)  # the classifier begins as zeros: gradients come a step later
    params = jax.device_get(state.params)
    return graph, params, {name: float(x) for name, x in run(state, batch)[1].items()}


def test_attention_is_described_as_defined():
    """Against softmax and logarithm in numpy, of the logits that the model returns in full."""
    graph, params, metrics = metrics_on((1, 1, 1))
    model = nnx.merge(graph, params)
    _, found = model(jnp.asarray(DATA["image"]), capture=("*attention_logits",))
    assert sorted(found) == [f"{place}/attention_logits" for place in PLACES]
    largest, least = {}, {}
    for place in PLACES:
        logits = np.asarray(found[f"{place}/attention_logits"], np.float64)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        entropy = -(weights * np.log(weights)).sum(-1)
        assert entropy.shape[:2] == (BATCH, 8), "rows and heads"
        largest[place] = np.abs(logits).max()
        least[place] = entropy.mean((0, 2)).min()
        assert metrics[f"attention/logit_max/{place}"] == pytest.approx(largest[place], rel=1e-5)
        assert metrics[f"attention/entropy_min/{place}"] == pytest.approx(least[place], rel=1e-5)
    assert metrics["attention/logit_max"] == pytest.approx(max(largest.values()), rel=1e-5)
    assert metrics["attention/entropy_min"] == pytest.approx(min(least.values()), rel=1e-5)
    assert max(least.values()) < np.log(16), "no head looks at all tokens alike"


def test_parts_of_the_gradient_make_the_whole():
    *_, metrics = metrics_on((1, 1, 1))
    prefix = "gradient_norm/"
    parts = {name.removeprefix(prefix): x for name, x in metrics.items() if prefix in name}
    names = {"embedding", "position", "block_0", "block_1", "encoder_norm", "pool", "head"}
    assert set(parts) == names
    assert min(parts.values()) > 0.0
    norm = np.sqrt(sum(x**2 for x in parts.values()))
    assert norm == pytest.approx(metrics["gradient_norm"], rel=1e-5)


def test_a_blocks_gradient_is_that_of_its_layer():
    graph, params, metrics = metrics_on((1, 1, 1))
    run = functools.partial(step.gradients, graph=graph, config=CONFIG, places=None)
    _, _, grads = jax.jit(run)(params, DATA)
    for i in range(2):
        leaves = [np.asarray(x[i]) for x in jax.tree.leaves(grads["encoder"]["blocks"])]
        norm = np.sqrt(sum(np.square(x).sum() for x in leaves))
        assert metrics[f"gradient_norm/block_{i}"] == pytest.approx(norm, rel=1e-4)


def test_they_are_the_same_on_a_mesh():
    *_, expected = metrics_on((1, 1, 1))
    *_, found = metrics_on((2, 1, 4))
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, err_msg=name)


def test_the_scan_keeps_a_number_for_each_row_and_head_and_no_logits():
    graph, params, _ = metrics_on((1, 1, 1))

    def forward(capture):
        run = lambda p, x: nnx.merge(graph, p)(x, capture=capture)  # noqa: E731
        jaxpr = jax.make_jaxpr(run)(params, DATA["image"]).jaxpr
        (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
        return sorted(v.aval.shape for v in scan.outvars)

    tokens = (BATCH, 16, 16)
    assert forward(statistics.CAPTURE) == [(2, BATCH, 8), (2, BATCH, 8), tokens]
    assert (2, BATCH, 8, 16, 16) in forward(("*attention_logits",))


def test_without_the_switch_there_are_none():
    config = dataclasses.replace(CONFIG, statistics=0)
    graph, state = step.abstract(config, None)
    run = functools.partial(step.train_step, graph=graph, config=config, places=None)
    _, metrics = jax.eval_shape(run, state, DATA)
    assert sorted(metrics) == [
        *("accuracy", "applied", "bad_streak", "gradient_norm", "learning_rate", "loss", "skipped")
    ]


def test_statistics_of_some_steps_are_a_second_program():
    """The steps without them run the usual one, and only those with them report them."""
    never, some, always = (dataclasses.replace(CONFIG, statistics=n) for n in (0, 3, 1))
    assert list(step.variants(never)) == [False]
    assert list(step.variants(some)) == [False, True]
    assert list(step.variants(always)) == [True]
    assert step.usual(some) == never
    assert [n for n in range(1, 10) if step.observed(some, n)] == [3, 6, 9]
    assert all(step.observed(always, n) for n in range(1, 4))
    assert not any(step.observed(never, n) for n in range(1, 4))
    with pytest.raises(ValueError, match="statistics=-1"):
        dataclasses.replace(CONFIG, statistics=-1)


def test_a_run_reports_statistics_every_so_many_steps(tmp_path):
    config = dataclasses.replace(
        CONFIG, statistics=2, steps=5, evaluate=5, out=tmp_path, mesh=(1, 1, 1)
    )
    train.train(config)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "gradient_norm" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in steps if "attention/logit_max" in line] == [2, 4]

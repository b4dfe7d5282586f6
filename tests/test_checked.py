"""Column checksums: a damaged payload is caught, and nothing else is taken for one."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import collective_matmul as cm
from collective_matmul import algorithms, backends
from collective_matmul.backends import xla

pytestmark = pytest.mark.slow

T = 4
SPECS = [
    ("mk,kn->mn", "gather_lhs", "m"),
    ("mk,kn->mn", "gather_lhs", "k"),
    ("mk,kn->mn", "gather_rhs", "n"),
    ("mk,kn->mn", "gather_rhs", "k"),
    ("bsd,bsf->df", "gather_lhs", "s"),
    ("k,kn->n", "gather_lhs", "k"),  # nothing is free on the left
    ("mk,kn->mn", "scatter", "m"),
    ("mk,kn->mn", "scatter", "n"),
    ("bsf,fd->bsd", "scatter", "s"),
]


def operands(spec, mode, letter, dtype="float32", seed=0, equal=False):
    """Both, `[T, ...]`: of each device. `equal` rows make errors of rounding that are equal too."""
    rng = np.random.default_rng(seed)
    sizes = dict(m=8, k=12, n=8, b=2, s=8, d=8, f=12)
    arrays = []
    for side, letters in zip(
        ("gather_lhs", "gather_rhs"), spec.split("->")[0].split(","), strict=True
    ):
        shape = [sizes[x] // (T if x == letter and side == mode else 1) for x in letters]
        array = rng.normal(size=(T, *shape))
        if equal:
            array[:] = array[:, :1]
        arrays.append(jnp.asarray(array, dtype))
    return arrays


def run(mesh, spec, mode, letter, arrays, backend="xla+checked", algorithm=None):
    def body(lhs, rhs):
        options = {mode: letter, "backend": backend, "algorithm": algorithm}
        return cm.collective_einsum(spec, lhs[0], rhs[0], "t", **options)[None]

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("t"), out_specs=P("t"))
    return np.asarray(jax.jit(mapped)(*arrays), np.float32)


@pytest.mark.parametrize("spec, mode, letter", SPECS)
def test_what_is_right_stays_as_it_is(mesh_of, spec, mode, letter):
    mesh = mesh_of(T)
    for dtype in ("float32", "bfloat16"):
        for seed, equal in ((0, False), (1, True)):
            arrays = operands(spec, mode, letter, dtype, seed, equal)
            plain = run(mesh, spec, mode, letter, arrays, backend="xla", algorithm="ring")
            found = run(mesh, spec, mode, letter, arrays, algorithm="ring")
            np.testing.assert_array_equal(found, plain)


def corrupting(monkeypatch, change, hops=1):
    """Lets the payloads of the first hops arrive changed, at device 1."""
    calls = []

    def ppermute(x, axis_name, perm):
        y = lax.ppermute(x, axis_name, perm)
        calls.append(y)
        if len(calls) > hops:
            return y
        return jnp.where(lax.axis_index(axis_name) == 1, change(y), y)

    monkeypatch.setattr(xla, "lax", types.SimpleNamespace(**{**vars(lax), "ppermute": ppermute}))


def one_element(x):
    """A power of two larger, as where a bit of its exponent flips."""
    return x.reshape(-1).at[0].multiply(2**16).reshape(x.shape)


def late(x):
    """What belongs elsewhere."""
    return jnp.roll(x, 1, axis=-1)


CHANGES = {"one element": one_element, "lost": jnp.zeros_like, "late": late}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("spec, mode, letter", SPECS)
def test_a_damaged_payload_is_caught(mesh_of, monkeypatch, spec, mode, letter, change):
    """And without the checksum it is not."""
    mesh = mesh_of(T)
    for dtype in ("float32", "bfloat16"):
        arrays = operands(spec, mode, letter, dtype)
        right = run(mesh, spec, mode, letter, arrays, backend="xla", algorithm="ring")
        with monkeypatch.context() as patched:
            corrupting(patched, CHANGES[change])
            silent = run(mesh, spec, mode, letter, arrays, backend="xla", algorithm="ring")
        with monkeypatch.context() as patched:
            corrupting(patched, CHANGES[change])
            caught = run(mesh, spec, mode, letter, arrays, algorithm="ring")
        assert not np.isnan(silent).any() and (silent != right).any()
        assert np.isnan(caught).any(axis=tuple(range(1, caught.ndim))).any()


@pytest.mark.parametrize("algorithm", algorithms.names())
def test_gradients_are_checked_too(mesh_of, algorithm):
    mesh = mesh_of(T)
    x, w = operands("mk,kn->mn", "gather_lhs", "m")

    def gradients(backend):
        def body(x, w):
            def loss(x, w):
                y = cm.collective_einsum(
                    "mk,kn->mn", x[0], w[0], "t", gather_lhs="m",
                    backend=backend, algorithm=algorithm,
                )  # fmt: skip
                return jnp.sum(jnp.tanh(y))

            return jax.grad(loss, (0, 1))(x, w)

        mapped = jax.shard_map(body, mesh=mesh, in_specs=P("t"), out_specs=P("t"))
        return jax.jit(mapped)(x, w)

    for found, plain in zip(gradients("xla+checked"), gradients("xla"), strict=True):
        np.testing.assert_array_equal(found, plain)


def test_a_step_with_a_damaged_payload_is_skipped(monkeypatch):
    """By the trainer's guard, which skips what is not finite; parameters stay what they were."""
    from models import configs, data, devices, step

    digits = configs.load("digits")
    model = dataclasses.replace(digits.model, width=16, mlp_dim=32, depth=1, heads=2)
    config = dataclasses.replace(
        digits, model=model, batch=16, mesh=(1, 1, 2), backend="xla+checked", steps=4
    )
    layout = devices.layout_of(config)
    images, _ = data.splits(
        config.data, image_shape=model.image_shape, channels=1, classes=10, seed=0
    )
    rows = step.rows_held(layout, config.batch)
    with data.stream(images, config.data, config.batch, seed=0, rows=rows) as stream:
        batch = next(stream)
    batch = step.place({name: x for name, x in batch.items() if name != "index"}, layout)
    graph, state = step.create(config, layout)
    before = jax.tree.map(np.asarray, state.params)
    with monkeypatch.context() as patched:
        corrupting(patched, lambda x: x * 3, hops=1000)
        damaged = step.compile_training(graph, config, state, batch)
    state, numbers = damaged(state, batch)
    assert float(numbers["applied"]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state.params), before)
    state, numbers = step.compile_training(graph, config, state, batch)(state, batch)
    assert float(numbers["applied"]) == 1.0


def test_what_cannot_be_checked_is_refused(mesh_of):
    mesh = mesh_of(T)
    whole = [x.astype(jnp.int32) for x in operands("mk,kn->mn", "gather_lhs", "m")]
    with pytest.raises(NotImplementedError, match="only floating dtypes have"):
        run(mesh, "mk,kn->mn", "gather_lhs", "m", whole)
    same = [jnp.ones((T, 2, 3)), jnp.ones((T, 2, 12))]
    with pytest.raises(NotImplementedError, match="no free letter to sum over"):
        run(mesh, "mk,mk->m", "gather_lhs", "k", same)
    with pytest.raises(ValueError, match="unknown backend 'xlb'"):
        backends.get("xlb+checked")


def test_checking_is_never_chosen_by_itself():
    assert not any("checked" in name for name in backends.names())

"""The primitive under jax's transformations, mesh kinds and other axes: value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import collective_matmul as cm
from collective_matmul import backends

from .helpers import collectives, lanes_plans, named, plan_id, plans, quick

B, S, D, F = 4, 6, 8, 12  # [b, s, d] . [d, f] . [f, d]
RING = dict(backend="xla", algorithm="ring")


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) / shape[-1] ** 0.5 for shape in shapes]


def layer(x, w, v, axis, **options):
    """`x + tanh(G(x) . w) . v` on shards: [b, s@t, d] . [d, f@t] . [f@t, d]."""
    hidden = jnp.tanh(cm.collective_einsum("bsd,df->bsf", x, w, axis, gather_lhs="s", **options))
    return x + cm.collective_einsum("bsf,fd->bsd", hidden, v, axis, scatter="s", **options)


def dense_layer(x, w, v):
    return x + jnp.tanh(x @ w) @ v


LAYER = (P("d", "t"), P(None, "t"), P("t"))  # x, w, v: weights are invariant over "d"


def agree(ours, theirs, operands, **tolerance):
    """Value and gradients of the sum of sines, within rounding."""
    tolerance = dict(rtol=2e-4, atol=2e-5) | tolerance
    argnums = tuple(range(len(operands)))

    def both(function):
        grad = jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), argnums)
        run = jax.jit(lambda *a: (function(*a), *grad(*a)), compiler_options=quick())
        return run(*operands)

    for got, want in zip(both(ours), both(theirs), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, **tolerance)


def on(mesh, function, in_specs, out_specs, **options):
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)


def layer_on(mesh, plan=("xla", "two_way"), axis="t", specs=LAYER, **options):
    named = dict(zip(("backend", "algorithm"), plan, strict=True))
    return on(mesh, functools.partial(layer, axis=axis, **named), specs, specs[0], **options)


def layer_operands(seed=0):
    return arrays((B, S, D), (D, F), (F, D), seed=seed)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("plan", [*plans(), (None, None)], ids=plan_id)
def test_beside_a_data_axis(plan, check_vma, mesh_of):
    """Weights that every device of the data axis shares get the sum of their gradients."""
    mesh = mesh_of(2, 3, names=("d", "t"))
    agree(layer_on(mesh, plan, check_vma=check_vma), dense_layer, layer_operands())


@pytest.mark.parametrize("check_vma", [True, False])
def test_operands_that_are_whole_everywhere(check_vma, mesh_of):
    """Weights, or activations, that the devices of the axis share rather than cut."""
    mesh = mesh_of(2, 3, names=("d", "t"))

    def whole_weights(x, w):  # every device has every row, and takes its own back
        y = cm.collective_einsum("bsd,df->bsf", x, w, "t", gather_lhs="s", **RING)
        rows = S // 3
        return lax.dynamic_slice_in_dim(y, lax.axis_index("t") * rows, rows, axis=1)

    ours = on(mesh, whole_weights, (P("d", "t"), P()), P("d", "t"), check_vma=check_vma)
    agree(ours, jnp.matmul, arrays((B, S, D), (D, F)))

    def whole_rows(x, w):  # a sum of three times the same
        return cm.collective_einsum("bsd,df->bsf", x, w, "t", scatter="s", **RING)

    ours = on(mesh, whole_rows, (P("d"), P()), P("d", "t"), check_vma=check_vma)
    agree(ours, lambda x, w: 3 * (x @ w), arrays((B, S, D), (D, F)))


def test_the_sum_over_the_data_axis_is_the_only_one(mesh_of):
    """Of the size of the weights' shard, once for each of them."""
    run = layer_on(mesh_of(2, 3, names=("d", "t")))
    found = named(jax.grad(lambda *a: jnp.sum(run(*a) ** 2), (0, 1, 2)), *layer_operands())
    sums = [equation for name in collectives(found) for equation in found[name]]
    assert sorted(x.invars[0].aval.shape for x in sums) == [(F // 3, D), (D, F // 3)]
    assert all(tuple(x.params["axes"]) == ("d",) for x in sums)


MODES = {
    "gather": ("bsd,df->bsf", dict(gather_lhs="s"), (P("d", "t"), P(None, "t")), P("d", None, "t")),
    "contract": ("bsd,df->bsf", dict(gather_lhs="d"), (P("d", None, "t"), P(None, "t")),
                 P("d", None, "t")),
    "weights": ("bsd,df->bsf", dict(gather_rhs="f"), (P("d", "t"), P(None, "t")), P("d", "t")),
    "scatter": ("bsd,df->bsf", dict(scatter="s"), (P("d", None, "t"), P("t")), P("d", "t")),
    "scatter features": ("bsd,df->bsf", dict(scatter="f"), (P("d", None, "t"), P("t")),
                         P("d", None, "t")),
}  # fmt: skip


def manual_part(spec):
    """The spec without the axis that shard_map leaves alone."""
    return P(*(None if axis == "d" else axis for axis in spec))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("other", [AxisType.Auto, AxisType.Explicit], ids=lambda x: x.name)
@pytest.mark.parametrize("own", [AxisType.Auto, AxisType.Explicit], ids=lambda x: x.name)
@pytest.mark.parametrize("plan", [("unfused", None), ("xla", "bidirectional")], ids=plan_id)
def test_partly_manual(plan, own, other, mode, mesh_of):
    """shard_map over "t" alone; "d" cuts the batch in its own way, weights are whole there."""
    mesh = Mesh(mesh_of(2, 2, names=("d", "t")).devices, ("d", "t"), axis_types=(other, own))
    spec, moved, in_specs, out_specs = MODES[mode]
    options = dict(zip(("backend", "algorithm"), plan, strict=True))
    x, w = arrays((B, S, D), (D, F))

    def product(x, w):
        return cm.collective_einsum(spec, x, w, "t", **moved, **options)

    cuts = tuple(map(manual_part, in_specs))
    run = jax.jit(on(mesh, product, cuts, manual_part(out_specs), axis_names={"t"}))

    def loss(x, w):
        return jnp.sum(jnp.sin(run(x, w)))

    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, at))
            for a, at in zip((x, w), in_specs, strict=True)
        ]
        try:
            y, grads = run(*placed), jax.jit(jax.grad(loss, (0, 1)))(*placed)
        except NotImplementedError as reason:
            pytest.skip(str(reason))
        # What jax makes of an array that only passes through, it makes of a product.
        same = jax.jit(on(mesh, lambda x: x, cuts[:1], cuts[0], axis_names={"t"}))(placed[0])
        wanted = NamedSharding(mesh, P(same.sharding.spec[0], *out_specs[1:]))
        assert y.sharding.is_equivalent_to(wanted, y.ndim)
        y, grads = np.asarray(y), [np.asarray(grad) for grad in grads]
    wanted = jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), (0, 1))(x, w)
    np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-5)
    for got, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda x: x.name)
def test_wholly_manual_on_either_kind_of_mesh(kind, mesh_of):
    mesh = Mesh(mesh_of(2, 3, names=("d", "t")).devices, ("d", "t"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, at))
            for a, at in zip(layer_operands(), LAYER, strict=True)
        ]
        run = jax.jit(layer_on(mesh))
        y = run(*placed)
        grads = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(run(*a))), (0, 1, 2)))(*placed)
        y, grads = np.asarray(y), [np.asarray(grad) for grad in grads]
    np.testing.assert_allclose(y, dense_layer(*layer_operands()), rtol=1e-4, atol=1e-5)
    wanted = jax.grad(lambda *a: jnp.sum(jnp.sin(dense_layer(*a))), (0, 1, 2))(*layer_operands())
    for got, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("plan", [("unfused", None), ("xla", "two_way")], ids=plan_id)
def test_without_jit(plan, mesh_of):
    options = dict(zip(("backend", "algorithm"), plan, strict=True))
    run = on(
        mesh_of(2), functools.partial(cm.all_gather_matmul, axis_name="t", **options),
        (P("t"), P(None, "t")), P(None, "t"),
    )  # fmt: skip
    x, w = arrays((4, 3), (3, 4))
    np.testing.assert_allclose(run(x, w), x @ w, rtol=1e-5)
    got, want = (jax.grad(lambda x, f=f: jnp.sum(f(x, w) ** 2))(x) for f in (run, jnp.matmul))
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_two_axes_beside_a_third(mesh_of):
    """axis_name=("t", "u") acts as their product; each device of "d" has rows of its own."""
    mesh = mesh_of(2, 2, 3, names=("d", "t", "u"))
    specs = (P("d", ("t", "u")), P(None, ("t", "u")), P(("t", "u")))
    for plan in (*lanes_plans(), ("unfused", None)):
        run = layer_on(mesh, plan, axis=("t", "u"), specs=specs)
        np.testing.assert_allclose(
            jax.jit(run)(*layer_operands()), dense_layer(*layer_operands()), rtol=1e-4, atol=1e-5
        )
    agree(run, dense_layer, layer_operands())


def test_axes_that_are_not_neighbours_in_the_mesh(mesh_of):
    """("t", "u") of a mesh (t, d, u): the product leaves the axis between them alone."""
    mesh = mesh_of(2, 2, 3, names=("t", "d", "u"))
    specs = (P("d", ("t", "u")), P(None, ("t", "u")), P(("t", "u")))
    agree(layer_on(mesh, axis=("t", "u"), specs=specs), dense_layer, layer_operands())


def test_rings_over_different_axes_in_one_program(mesh_of):
    """Weights gathered over "d", activations over "t"."""
    mesh = mesh_of(2, 3, names=("d", "t"))

    def body(x, w, v):
        w = cm.all_gather(w, "d", dim=0, **RING)
        hidden = cm.collective_einsum("bsd,df->bsf", x, w, "t", gather_lhs="s", **RING)
        mine = cm.collective_einsum("bsf,fd->bsd", jnp.tanh(hidden), v, "d", gather_rhs="d", **RING)
        return x + cm.reduce_scatter(mine, "t", dim=1, **RING)

    specs = (P("d", "t"), P("d", "t"), P("t", "d"))
    agree(on(mesh, body, specs, specs[0]), dense_layer, layer_operands())


def layers(seed=1, n=3):
    x, w, v = layer_operands(seed)
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.5, 1.5, size=(n, 1, 1)).astype(np.float32)
    return [x, sizes * w, sizes * v]


def dense_layers(x, w, v):
    for i in range(len(w)):
        x = dense_layer(x, w[i], v[i])
    return x


STACKED = (P("d", "t"), P(None, None, "t"), P(None, "t"))
REMAT = {
    "plain": lambda f: f,
    "remat": jax.checkpoint,
    "remat saving dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable
    ),
    "remat saving all": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.everything_saveable
    ),
}


@pytest.mark.parametrize("remat", REMAT)
def test_scan_over_layers_within(remat, mesh_of):
    mesh = mesh_of(2, 2, names=("d", "t"))

    def body(x, w, v):
        step = REMAT[remat](lambda x, wv: (layer(x, *wv, "t", **RING), None))
        return lax.scan(step, x, (w, v))[0]

    agree(on(mesh, body, STACKED, STACKED[0]), dense_layers, layers())


@pytest.mark.parametrize("remat", ["plain", "remat"])
def test_scan_over_layers_around(remat, mesh_of):
    run = layer_on(mesh_of(2, 2, names=("d", "t")))

    def whole(x, w, v):
        return lax.scan(REMAT[remat](lambda x, wv: (run(x, *wv), None)), x, (w, v))[0]

    agree(whole, dense_layers, layers())


def test_loops_and_branches(mesh_of):
    """fori_loop, whose number of turns is not known, and cond, alike on every device."""
    mesh = mesh_of(2, 2, names=("d", "t"))

    def body(n, x, w, v):
        x = lax.fori_loop(0, n, lambda _, x: layer(x, w, v, "t", **RING), x)
        return lax.cond(n > 1, lambda x: layer(x, w, v, "t", **RING), lambda x: x, x)

    run = jax.jit(on(mesh, body, (P(), *LAYER), LAYER[0]))
    x, w, v = layer_operands()
    for n, times in ((0, 0), (1, 1), (2, 3)):
        want = x
        for _ in range(times):
            want = dense_layer(want, w, v)
        np.testing.assert_allclose(run(n, x, w, v), want, rtol=1e-4, atol=1e-5)


AXES = {"lhs": (0, None), "rhs": (None, 0), "both": (0, 0), "inner": (1, 2)}


@pytest.mark.parametrize("plan", [("unfused", None), ("xla", "bidirectional")], ids=plan_id)
@pytest.mark.parametrize("mapped", AXES)
def test_vmap_within(mapped, plan, mesh_of):
    """Over a batch of one operand, of the other, of both, at dimensions of their own."""
    options = dict(zip(("backend", "algorithm"), plan, strict=True))
    at = AXES[mapped]
    x, w = arrays((6, 4), (4, 6))
    x, w = (
        a if i is None else np.stack([a, 2 * a, -a], axis=i)
        for a, i in zip((x, w), at, strict=True)
    )
    specs = [[None, None] for _ in at]
    for spec, i, cut in zip(specs, at, ("t", None), strict=True):
        spec[0] = cut
        if i is not None:
            spec.insert(i, None)
    specs = [P(*spec) for spec in specs]
    cut = on(
        mesh_of(3),
        lambda x, w: jax.vmap(
            lambda x, w: lax.dynamic_slice_in_dim(
                cm.all_gather_matmul(x, w, "t", **options), 2 * lax.axis_index("t"), 2, axis=0
            ), in_axes=at,
        )(x, w),
        tuple(specs), P(None, "t"),
    )  # fmt: skip
    agree(cut, jax.vmap(jnp.matmul, in_axes=at), [x, w])
    back = on(
        mesh_of(3),
        jax.vmap(functools.partial(cm.matmul_reduce_scatter, axis_name="t", **options), in_axes=at),
        tuple(P() for _ in at), P(None, "t"),
    )  # fmt: skip
    agree(back, lambda x, w: 3 * jax.vmap(jnp.matmul, in_axes=at)(x, w), [x, w])


@pytest.mark.parametrize("mapped", ["lhs", "rhs", "both"])
def test_vmap_around(mapped, mesh_of):
    at = AXES[mapped]
    x, w = arrays((6, 4), (4, 6))
    x, w = (a if i is None else np.stack([a, 2 * a]) for a, i in zip((x, w), at, strict=True))
    for options in (RING, dict(backend="unfused")):
        gather = on(
            mesh_of(3), functools.partial(cm.all_gather_matmul, axis_name="t", **options),
            (P("t"), P(None, "t")), P(None, "t"),
        )  # fmt: skip
        agree(jax.vmap(gather, in_axes=at), jax.vmap(jnp.matmul, in_axes=at), [x, w])


@pytest.mark.parametrize("plan", [*plans(), (None, None)], ids=plan_id)
def test_an_axis_of_vmap_in_place_of_a_mesh(plan):
    """One device, and arrays with a leading dimension, are a mesh for every t."""
    options = dict(zip(("backend", "algorithm"), plan, strict=True), axis_name="i")
    x, w, a, v = arrays((5, 3, 4), (4, 6), (5, 10, 15), (5, 15, 7))
    gather = jax.vmap(
        functools.partial(cm.all_gather_matmul, **options), in_axes=(0, None), axis_name="i"
    )
    scatter = jax.vmap(functools.partial(cm.matmul_reduce_scatter, **options), axis_name="i")
    try:
        agree(gather, lambda x, w: jnp.stack([x.reshape(15, 4) @ w] * 5), [x, w])
        agree(scatter, lambda a, v: jnp.einsum("imk,ikn->mn", a, v).reshape(5, 2, 7), [a, v])
    except NotImplementedError as reason:
        pytest.skip(str(reason))


def test_the_mesh_may_come_from_the_context(mesh_of):
    mesh = mesh_of(2, 3, names=("d", "t"))
    body = functools.partial(layer, axis="t", **RING)
    with jax.set_mesh(mesh):
        y = jax.jit(jax.shard_map(body, in_specs=LAYER, out_specs=LAYER[0]))(*layer_operands())
        y = np.asarray(y)
    np.testing.assert_allclose(y, dense_layer(*layer_operands()), rtol=1e-4, atol=1e-5)


def test_results_vary_over_the_axis_and_over_what_the_operands_vary_over(mesh_of):
    """The type of a result says so: check_vma=True holds every use to it."""
    mesh, seen = mesh_of(2, 2, 2, names=("d", "e", "t")), []

    def body(x, w):
        for moved in (dict(gather_lhs="s"), dict(scatter="f")):
            for backend in backends.names():
                y = cm.collective_einsum("bsd,df->bsf", x, w, "t", backend=backend, **moved)
                seen.append(set(jax.typeof(y).manual_axis_type.varying))
        return x

    run = on(mesh, body, (P("d"), P()), P("d"))
    jax.eval_shape(run, *arrays((B, S, D), (D, F)))
    assert len(seen) == 2 * len(backends.names())
    assert all(axes == {"d", "t"} for axes in seen)


def test_gradients_accumulate_over_microbatches(mesh_of):
    """A scan of gradients, each of a part of the batch: what a trainer does."""
    mesh = mesh_of(2, 2, names=("d", "t"))
    run = layer_on(mesh)
    x, w, v = layer_operands()
    parts = np.stack([x, -2 * x])

    def total(function, w, v):
        def step(sums, x):
            grads = jax.grad(lambda w, v: jnp.sum(function(x, w, v) ** 2), (0, 1))(w, v)
            return jax.tree.map(jnp.add, sums, grads), None

        return lax.scan(step, jax.tree.map(jnp.zeros_like, (w, v)), parts)[0]

    ours, theirs = (jax.jit(functools.partial(total, f))(w, v) for f in (run, dense_layer))
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-4)


def test_donated_operands(mesh_of):
    """A buffer given away is not read after it is overwritten."""
    mesh = mesh_of(2, 3, names=("d", "t"))
    run = jax.jit(layer_on(mesh), donate_argnums=0)
    x, w, v = layer_operands()
    placed = jax.device_put(x, NamedSharding(mesh, LAYER[0]))
    np.testing.assert_allclose(run(placed, w, v), dense_layer(x, w, v), rtol=1e-4, atol=1e-5)
    assert placed.is_deleted()

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

from collective_matmul import Layout, make_mesh, nn

from .helpers import named, permutes, quick

KEY = jax.random.key(0)
LAYOUTS = [((2, 1, 4), "tokens"), ((2, 2, 2), "tokens"), ((2, 2, 2), "features")]


def layout_of(sizes, kind="tokens", **options):
    options = {"algorithm": "ring"} | options
    return Layout(make_mesh(*sizes, devices=jax.devices()[:8]), activations=kind, **options)


@pytest.fixture(params=LAYOUTS, ids=lambda p: f"{'x'.join(map(str, p[0]))}-{p[1]}")
def layout(request):
    return layout_of(*request.param)


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def run(function, *arguments):
    """Compiled: op by op, a shard_map on 8 devices takes seconds."""
    return jax.jit(function, compiler_options=quick())(*arguments)


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def same_tree(ours, theirs):
    def shapes(module):
        return jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(module)))

    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("use_bias", [True, False])
def test_parameters_are_those_of_linear(use_bias, layout):
    ours = nn.ColumnParallel(8, 16, use_bias=use_bias, layout=layout, rngs=nnx.Rngs(0))
    theirs = nnx.Linear(8, 16, use_bias=use_bias, rngs=nnx.Rngs(0))
    same_tree(ours, theirs)
    close(ours.kernel[...], theirs.kernel[...], 0)
    x = normal(1, 4, 8, 8)
    close(run(ours, x), theirs(x))


@pytest.mark.parametrize("kind", ["column", "row"])
def test_checkpoints_of_linear_general_load_both_ways(kind, layout):
    sizes = (8, (4, 2)) if kind == "column" else ((4, 2), 8)
    make = nn.ColumnParallel if kind == "column" else nn.RowParallel
    axis = (-1,) if kind == "column" else (-2, -1)
    x = normal(1, 4, 8, 8) if kind == "column" else normal(1, 4, 8, 4, 2)
    ours = make(*sizes, layout=layout, rngs=nnx.Rngs(0))
    theirs = nnx.LinearGeneral(*sizes, axis=axis, bias_init=jax.random.normal, rngs=nnx.Rngs(1))
    same_tree(ours, theirs)
    nnx.update(ours, nnx.state(theirs))
    close(run(ours, x), theirs(x))
    back = nnx.LinearGeneral(*sizes, axis=axis, rngs=nnx.Rngs(2))
    nnx.update(back, nnx.state(nn.shard(ours)))
    close(back.kernel[...], theirs.kernel[...], 0)
    close(run(back, x), theirs(x))


def test_a_linen_dense_checkpoint_loads(layout):
    x = normal(1, 4, 8, 8)
    dense = linen.Dense(16, bias_init=jax.random.normal)
    variables = dense.init(KEY, x)
    ours = nn.ColumnParallel(8, 16, layout=layout, rngs=nnx.Rngs(0))
    nnx.update(ours, variables["params"])
    close(run(nn.shard(ours), x), dense.apply(variables, x))


def test_input_projection_is_linear(layout):
    ours = nn.InputProjection(6, 16, layout=layout, rngs=nnx.Rngs(0))
    theirs = nnx.Linear(6, 16, rngs=nnx.Rngs(0))
    same_tree(ours, theirs)
    x = normal(1, 4, 8, 6)
    close(run(nn.shard(ours), x), theirs(x))


@pytest.mark.parametrize("gated", [False, True])
def test_mlp_is_the_formula(gated, layout):
    arguments = {"gated": gated, "bias_init": jax.random.normal, "rngs": nnx.Rngs(0)}
    mlp = nn.MLP(8, 32, layout=layout, **arguments)
    x = normal(1, 4, 8, 8)
    hidden = x @ mlp.up.kernel[...] + mlp.up.bias[...].reshape(1, 1, -1)
    if gated:
        gate = x @ mlp.gate.kernel[...] + mlp.gate.bias[...].reshape(1, 1, -1)
        hidden = jax.nn.gelu(gate) * hidden
    else:
        hidden = jax.nn.gelu(hidden)
    want = hidden @ mlp.down.kernel[...] + mlp.down.bias[...].reshape(1, 1, -1)
    close(run(mlp, x), want)


@pytest.mark.parametrize("kind", ["tokens", "features"])
def test_several_modules_share_one_collective(kind):
    layout = layout_of((2, 1, 4), kind)
    rngs = nnx.Rngs(0, params=0)
    make = functools.partial(
        nn.ColumnParallel, layout=layout, bias_init=jax.random.normal, rngs=rngs
    )
    query, value, up = make(8, (4, 2)), make(8, (4, 2), use_bias=False), make(8, 16)
    make = functools.partial(nn.RowParallel, layout=layout, bias_init=jax.random.normal, rngs=rngs)
    out, down = make((4, 2), 8), make(16, 8)
    x = normal(1, 4, 8, 8)
    q, v, h = run(lambda x: nn.column(x, query, value, up), x)
    for together, alone in ((q, query), (v, value), (h, up)):
        close(together, run(alone, x))
    got = run(lambda q, h: nn.row((q, h), out, down), q, h)
    close(got, run(out, q) + run(down, h))

    assert len(permutes(named(lambda x: nn.column(x, query, value, up), x))) == 3
    assert len(permutes(named(lambda q, h: nn.row((q, h), out, down), q, h))) == 3


def test_modules_of_one_collective_must_agree():
    one = nn.ColumnParallel(8, 8, layout=None, rngs=nnx.Rngs(0))
    other = nn.ColumnParallel(8, 8, layout=layout_of((2, 1, 4)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="2 modules of one collective have 2 layouts"):
        nn.column(normal(1, 4, 8, 8), one, other)
    other = nn.ColumnParallel(8, 8, layout=None, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"dtypes .*bfloat16.*give them the same"):
        nn.column(normal(1, 4, 8, 8), one, other)


@pytest.mark.parametrize("sizes", [(2, 1, 4), (1, 2, 4)])
def test_what_travels_is_as_narrow_as_the_compute_dtype(sizes):
    mlp = nn.MLP(8, 16, dtype=jnp.bfloat16, layout=layout_of(sizes), rngs=nnx.Rngs(0))
    sent = permutes(named(mlp, normal(1, 4, 8, 8)))
    assert len(sent) >= 6
    assert {equation.invars[0].aval.dtype for equation in sent} == {jnp.dtype("bfloat16")}
    assert jax.eval_shape(mlp, normal(1, 4, 8, 8)).dtype == jnp.bfloat16
    assert mlp.up.kernel.dtype == jnp.float32


def test_partition_specs():
    layout = layout_of((2, 2, 2))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nn.InputProjection(6, 8, layout=layout, rngs=rngs)
            self.query = nn.ColumnParallel(8, (4, 2), layout=layout, rngs=rngs)
            self.out = nn.RowParallel((4, 2), 8, use_bias=False, layout=layout, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)

    specs = nnx.to_pure_dict(nn.partition_specs(Model(nnx.Rngs(0))))
    assert specs == {
        "first": {"kernel": P(None, ("fsdp", "tensor")), "bias": P(None)},
        "query": {"kernel": P("fsdp", "tensor", None), "bias": P("tensor", None)},
        "out": {"kernel": P("tensor", None, "fsdp")},
        "norm": {"scale": P(), "bias": P()},
    }
    stacked = nnx.vmap(lambda key: Model(nnx.Rngs(key)))(jax.random.split(KEY, 3))
    specs = nnx.to_pure_dict(nn.partition_specs(stacked))
    assert specs["query"]["kernel"] == P(None, "fsdp", "tensor", None)
    assert specs["out"]["kernel"] == P(None, "tensor", None, "fsdp")
    nn.shard(stacked)
    assert stacked.query.kernel[...].sharding.spec == P(None, "fsdp", "tensor", None)
    assert stacked.query.kernel[...].addressable_shards[0].data.shape == (3, 4, 2, 2)


def test_create_makes_the_same_values_in_place(layout):
    plain = nn.MLP(8, 16, layout=None, rngs=nnx.Rngs(0))
    placed = nn.create(lambda: nn.MLP(8, 16, layout=layout, rngs=nnx.Rngs(0)))
    assert placed.up.kernel[...].sharding.spec == layout.column_kernel()
    ours, theirs = (nnx.to_pure_dict(nnx.state(module)) for module in (placed, plain))
    jax.tree.map(functools.partial(close, tolerance=1e-6), ours, theirs)


def test_without_a_layout_nothing_is_placed():
    mlp = nn.create(lambda: nn.MLP(8, 16, layout=None, rngs=nnx.Rngs(0)))
    assert set(jax.tree.leaves(nn.partition_specs(mlp))) == {P()}
    before = mlp.up.kernel[...].sharding
    assert nn.shard(mlp).up.kernel[...].sharding == before


def test_two_meshes_are_refused():
    mlp = nn.MLP(8, 16, layout=layout_of((2, 1, 4)), rngs=nnx.Rngs(0))
    mlp.down = nn.RowParallel(16, 8, layout=layout_of((1, 1, 8)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="lie on 2 meshes"):
        nn.shard(mlp)


LAYERS = {
    "linen.Dense": ("dot_general", "column"),
    "linen.DenseGeneral": ("dot_general", "row"),
    "linen.MultiHeadDotProductAttention": ("qkv_dot_general", "column", "out_dot_general", "row"),
    "nnx.Linear": ("dot_general", "column"),
    "nnx.LinearGeneral": ("dot_general", "column"),
    "nnx.Einsum": ("einsum_op", "row"),
}


def hooked(layer, layout):
    """(flax's own layer with the hook, the same without it, x) of each layer that takes one."""
    names, kinds = LAYERS[layer][::2], LAYERS[layer][1::2]
    hooks = {name: nn.dot_general(layout, kind) for name, kind in zip(names, kinds, strict=True)}
    if layer == "nnx.Einsum":
        hooks = {name: hook.einsum for name, hook in hooks.items()}
    bias = {"bias_init": jax.random.normal}
    attention = linen.MultiHeadDotProductAttention
    make = {
        "linen.Dense": functools.partial(linen.Dense, 16, **bias),
        "linen.DenseGeneral": functools.partial(linen.DenseGeneral, 8, axis=(-2, -1), **bias),
        "linen.MultiHeadDotProductAttention": functools.partial(attention, 4, qkv_features=8),
        "nnx.Linear": functools.partial(nnx.Linear, 8, 16, **bias),
        "nnx.LinearGeneral": functools.partial(nnx.LinearGeneral, 8, (4, 2), **bias),
        "nnx.Einsum": functools.partial(nnx.Einsum, "bshk,hkd->bsd", (4, 2, 8), (8,), **bias),
    }[layer]
    x = normal(1, 4, 8, 8) if "column" in kinds else normal(2, 4, 8, 4, 2)
    if layer.startswith("nnx"):
        return make(**hooks, rngs=nnx.Rngs(0)), make(rngs=nnx.Rngs(0)), x
    variables = make().init(KEY, x)
    apply = [functools.partial(make(**extra).apply, variables) for extra in (hooks, {})]
    return *apply, x


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", ["tokens", "features"])
def test_the_hook_serves_the_layers_of_flax(layer, kind):
    layout = layout_of((2, 1, 4), kind)
    ours, theirs, x = hooked(layer, layout)
    close(run(ours, x), theirs(x))
    assert len(permutes(named(ours, x))) >= 3
    ours, theirs, x = hooked(layer, None)
    close(ours(x), theirs(x), 0)
    got = jax.grad(lambda x: jnp.sum(jnp.square(ours(x))))(x)
    close(got, jax.grad(lambda x: jnp.sum(jnp.square(theirs(x))))(x), 0)


def test_the_hook_is_a_value():
    layout = layout_of((2, 1, 4))
    assert nn.dot_general(layout, "row") == nn.dot_general(layout, "row")
    assert hash(nn.dot_general(layout, "row")) == hash(nn.dot_general(layout, "row"))


def test_the_hook_refuses_other_products():
    layout = layout_of((2, 1, 4))
    column, row = nn.dot_general(layout, "column"), nn.dot_general(layout, "row")
    x, kernel = normal(1, 4, 8, 8), normal(2, 8, 8)
    for dims in (([2], [1]), ((), ())), (([1], [0]), ((), ())), (([2], [0]), ([0], [1])):
        with pytest.raises(ValueError, match="contracts the last dimensions of x"):
            column(x, kernel, dims)
    with pytest.raises(ValueError, match=r"contracts 1 dimension of a kernel \(4, 2, 8\), not 2"):
        column(normal(1, 4, 8, 4, 2), normal(2, 4, 2, 8), (([2, 3], [0, 1]), ((), ())))
    with pytest.raises(ValueError, match=r"contracts 2 dimensions of a kernel \(8, 4, 2\), not 1"):
        row(x, normal(2, 8, 4, 2), (([2], [0]), ((), ())))
    plain = ((2,), (0,)), ((), ())
    with pytest.raises(NotImplementedError, match="preferred_element_type=float32 of bfloat16"):
        column(
            x.astype(jnp.bfloat16),
            kernel.astype(jnp.bfloat16),
            plain,
            preferred_element_type=jnp.float32,
        )
    with pytest.raises(NotImplementedError, match="the layout says where y lies"):
        column(x, kernel, plain, out_sharding=P("data"))
    with pytest.raises(ValueError, match="'bsd,df->bsf'"):
        column.einsum("bsd,df->bfs", x, kernel)
    with pytest.raises(ValueError, match="neither 'column' nor 'row'"):
        nn.dot_general(layout, "colum")


def test_the_hook_passes_the_precision_on():
    layout = layout_of((2, 1, 4))
    column = nn.dot_general(layout, "column")
    dims = ((2,), (0,)), ((), ())
    x, kernel = normal(1, 4, 8, 8), normal(2, 8, 8)
    text = str(jax.make_jaxpr(lambda: column(x, kernel, dims, precision="highest"))())
    assert "HIGHEST" in text
    assert "HIGHEST" not in str(jax.make_jaxpr(lambda: column(x, kernel, dims))())


def test_gradients_equal_those_of_one_device(layout):
    def loss(state, x, graph):
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(x)))

    x = normal(1, 4, 8, 8)
    grads = []
    for at in (None, layout):
        graph, state = nnx.split(nn.MLP(8, 16, layout=at, rngs=nnx.Rngs(0)))
        grads.append(jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(state, x, graph))
    jax.tree.map(close, *map(nnx.to_pure_dict, [g[0] for g in grads]))
    close(grads[1][1], grads[0][1])


def test_replaced_options_are_another_layout():
    layout = layout_of((2, 1, 4))
    two_way = dataclasses.replace(layout, algorithm="two_way")
    x = normal(1, 4, 8, 8)
    layer = nn.ColumnParallel(8, 8, layout=layout, rngs=nnx.Rngs(0))
    other = nn.ColumnParallel(8, 8, layout=two_way, rngs=nnx.Rngs(0))
    close(run(layer, x), run(other, x))

"""The dense layers on every mesh, in every layout: the numbers of plain einsums on one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import collective_matmul as cm
from collective_matmul import Layout, dense

from .helpers import collectives, equations, lanes_plans, named, permutes, plan_id, quick

B, S, D, F, H, C = 8, 8, 16, 24, 8, 5  # batch, sequence, width, hidden units, heads, channels
SIZES = [(1, 1, 8), (2, 1, 4), (1, 2, 4), (2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 1)]
KINDS = {
    "tokens": dict(activations="tokens"),
    "batch rows": dict(activations="tokens", token_dim=0),
    "features": dict(activations="features"),
}


def mesh_with(sizes, kind=AxisType.Auto):
    data, fsdp, tensor = sizes
    return cm.make_mesh(
        data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: data * fsdp * tensor],
        axis_types=kind,
    )  # fmt: skip


def parameters(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = dict(
        x=(B, S, D), x4=(B, S, 3, D), hidden=(B, S, F), heads=(B, S, H, 2), image=(B, S, C),
        column=(D, F), column_bias=(F,), split=(D, H, 2), split_bias=(H, 2), up=(D, F),
        row=(F, D), row_bias=(D,), join=(H, 2, D), embed=(C, D),
    )  # fmt: skip
    return {
        name: (rng.normal(size=shape) / 3).astype(dtype) for name, shape in sorted(shapes.items())
    }


def layers(p, layout):
    """Every layer in every form, by the library."""
    return dict(
        column=dense.column_parallel(p["x"], p["column"], p["column_bias"], layout=layout),
        heads=dense.column_parallel(p["x"], p["split"], p["split_bias"], layout=layout),
        several=dense.column_parallel(
            p["x"], (p["split"], p["up"]), (None, p["column_bias"]), layout=layout
        ),
        column4=dense.column_parallel(p["x4"], p["column"], layout=layout),
        row=dense.row_parallel(p["hidden"], p["row"], p["row_bias"], layout=layout),
        join=dense.row_parallel(p["heads"], p["join"], layout=layout),
        sum=dense.row_parallel(
            (p["hidden"], p["heads"]), (p["row"], p["join"]), p["row_bias"], layout=layout
        ),
        embed=dense.embed(p["image"], p["embed"], p["row_bias"], layout=layout),
        mlp=dense.mlp(
            p["x"], p["column"], p["row"], p["column_bias"], p["row_bias"],
            activation=jax.nn.gelu, layout=layout,
        ),
        mlp4=dense.mlp(p["x4"], p["column"], p["row"], activation=jnp.tanh, layout=layout),
        gated=dense.mlp(
            p["x"], (p["column"], p["up"]), p["row"], (None, p["column_bias"]),
            activation=jax.nn.silu, layout=layout,
        ),
    )  # fmt: skip


def plain(p):
    """The same by einsums that anyone would write."""
    up = jnp.einsum("bsd,df->bsf", p["x"], p["up"]) + p["column_bias"]
    row = jnp.einsum("bsf,fd->bsd", p["hidden"], p["row"])
    join = jnp.einsum("bshk,hkd->bsd", p["heads"], p["join"])
    split = jnp.einsum("bsd,dhk->bshk", p["x"], p["split"])
    column = jnp.einsum("bsd,df->bsf", p["x"], p["column"])
    column4 = jnp.einsum("bstd,df->bstf", p["x4"], p["column"])
    return dict(
        column=column + p["column_bias"],
        heads=split + p["split_bias"],
        several=(split, up),
        column4=column4,
        row=row + p["row_bias"],
        join=join,
        sum=row + join + p["row_bias"],
        embed=jnp.einsum("bsc,cd->bsd", p["image"], p["embed"]) + p["row_bias"],
        mlp=jax.nn.gelu(column + p["column_bias"]) @ p["row"] + p["row_bias"],
        mlp4=jnp.tanh(column4) @ p["row"],
        gated=(jax.nn.silu(column) * up) @ p["row"],
    )


def both(function):
    """Values of all layers, and the gradients of all operands by a loss of all layers."""

    def loss(p):
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(function(p)))

    return lambda p: (function(p), jax.grad(loss)(p))


@functools.cache
def wanted():
    with jax.numpy_rank_promotion("allow"):  # as anyone would write
        return jax.tree.map(np.asarray, jax.jit(both(plain))(parameters()))


def compare(got, want, **tolerance):
    ours, theirs = (jax.tree_util.tree_leaves_with_path(x) for x in (got, want))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    wrong = []
    for (path, x), (_, y) in zip(ours, theirs, strict=True):
        if x.shape != y.shape:
            wrong.append(f"{jax.tree_util.keystr(path)}: {x.shape}, not {y.shape}")
        elif not np.allclose(x, y, **tolerance):
            wrong.append(f"{jax.tree_util.keystr(path)}: off by {np.abs(x - y).max()}")
    assert not wrong, "\n".join(wrong)


def run(function, p):
    return jax.jit(function).lower(p).compile(compiler_options=quick())(p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda x: "x".join(map(str, x)))
def test_values_and_gradients_on_every_mesh(sizes, kind):
    layout = Layout(mesh_with(sizes), **KINDS[kind], algorithm="two_way")
    got = run(both(functools.partial(layers, layout=layout)), parameters())
    compare(got, wanted(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 4)], ids=lambda x: "x".join(map(str, x)))
def test_sharding_constraints_alone_give_the_same(sizes, kind):
    """The baseline has the same arrays in the same places, and none of our collectives."""
    layout = Layout(mesh_with(sizes), **KINDS[kind], partitioner="gspmd")
    program = both(functools.partial(layers, layout=layout))
    compare(run(program, parameters()), wanted(), rtol=1e-4, atol=2e-5)
    names = {e.primitive.name for e in equations(jax.make_jaxpr(program)(parameters()))}
    assert "sharding_constraint" in names
    assert not {"shard_map", "ppermute"} & names


def test_the_compiler_alone_gathers_and_scatters():
    """On 4 devices of one axis: what GSPMD makes of the constraints are its own collectives."""
    layout = Layout(mesh_with((1, 1, 4)), partitioner="gspmd")
    program = functools.partial(layers_gated, layout=layout)
    text = jax.jit(program).lower(parameters()).compile(compiler_options=quick()).as_text()
    assert re.search(r"\ball-gather\(", text)
    assert "collective-permute" not in text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"partitioner": "xmap"}, "neither 'shard_map' nor 'gspmd'"),
        ({"partitioner": "gspmd", "algorithm": "ring"}, "algorithm='ring' has no meaning"),
        ({"partitioner": "gspmd", "precision": "highest"}, "precision='highest' has no meaning"),
    ],
)
def test_what_a_partitioner_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        Layout(mesh_with((1, 1, 4)), **options)


def test_the_compiler_partitions_auto_axes_only():
    with pytest.raises(ValueError, match="needs axes of type Auto"):
        Layout(mesh_with((1, 1, 4), AxisType.Explicit), partitioner="gspmd")


def test_without_a_layout():
    got = run(both(functools.partial(layers, layout=None)), parameters())
    compare(got, wanted(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("plan", [*lanes_plans(), ("unfused", None), (None, None)], ids=plan_id)
@pytest.mark.parametrize("kind", ["tokens", "features"])
def test_every_plan(plan, kind):
    """An MLP, its weights cut over both axes."""
    named_plan = dict(zip(("backend", "algorithm"), plan, strict=True))
    layout = Layout(mesh_with((2, 2, 2)), **KINDS[kind], **named_plan)

    def mlp(p, layout):
        return {"gated": layers_gated(p, layout)}

    p = parameters()
    (value, grads), (_, expected) = (
        run(both(functools.partial(mlp, layout=at)), p) for at in (layout, None)
    )
    compare(value, {"gated": wanted()[0]["gated"]}, rtol=1e-4, atol=2e-5)
    compare(grads, expected, rtol=1e-4, atol=2e-5)


def layers_gated(p, layout):
    return dense.mlp(
        p["x"], (p["column"], p["up"]), p["row"], (None, p["column_bias"]),
        activation=jax.nn.silu, layout=layout,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_on_an_explicit_mesh(kind):
    """Where arrays lie is part of their type there; the layers bring them where they belong."""
    mesh = mesh_with((2, 2, 2), AxisType.Explicit)
    layout = Layout(mesh, **KINDS[kind])
    with jax.set_mesh(mesh):
        for spec in (P(), P("tensor")):
            placed = {
                key: jax.device_put(x, NamedSharding(mesh, spec if len(x) % 2 == 0 else P()))
                for key, x in parameters().items()
            }
            got = run(both(functools.partial(layers, layout=layout)), placed)
            compare(jax.tree.map(np.asarray, got), wanted(), rtol=1e-4, atol=2e-5)
            if kind != "tokens":  # one kind from either place is enough
                break


def test_without_jit():
    """Eagerly, on arrays that lie on one device, and on numpy's."""
    layout = Layout(mesh_with((2, 2, 2)))
    p = parameters()
    for put in (np.asarray, jnp.asarray):
        y = dense.mlp(put(p["x"]), put(p["column"]), put(p["row"]), put(p["column_bias"]),
                      put(p["row_bias"]), activation=jax.nn.gelu, layout=layout)  # fmt: skip
        np.testing.assert_allclose(y, wanted()[0]["mlp"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_results_lie_as_documented(kind):
    mesh = mesh_with((2, 2, 2))
    layout = Layout(mesh, **KINDS[kind])
    p = parameters()
    got = run(functools.partial(layers, layout=layout), p)
    data = ("data", "fsdp")
    between = {
        "tokens": P(data, "tensor"),
        "batch rows": P((*data, "tensor")),
        "features": P(data, None, "tensor"),
    }[kind]
    within = P(data, None, "tensor")
    places = dict(
        column=within, heads=within, row=between, join=between, sum=between, embed=between,
        mlp=between, gated=between, column4=P(data, None, None, "tensor"),
    )  # fmt: skip
    if kind != "features":
        places["mlp4"] = between
    else:
        places["mlp4"] = P(data, None, None, "tensor")
    for name, spec in places.items():
        y = got[name]
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), y.ndim), name
    for y in got["several"]:
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, within), y.ndim)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_lie_as_their_parameters(kind):
    """Cut over fsdp as the parameters are: nothing is whole in the backward pass's results."""
    mesh = mesh_with((2, 2, 2))
    layout = Layout(mesh, **KINDS[kind])
    specs = dict(
        column=layout.column_kernel(),
        row=layout.row_kernel(),
        column_bias=layout.column_bias(),
        row_bias=layout.row_bias(),
    )
    p = parameters()
    placed = {key: jax.device_put(p[key], NamedSharding(mesh, spec)) for key, spec in specs.items()}

    def loss(w):
        y = dense.mlp(p["x"], w["column"], w["row"], w["column_bias"], w["row_bias"],
                      activation=jax.nn.gelu, layout=layout)  # fmt: skip
        return jnp.sum(jnp.sin(y))

    for name, grad in jax.jit(jax.grad(loss))(placed).items():
        assert grad.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), grad.ndim), name


@pytest.mark.parametrize("kind", ["batch rows", "features"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8)], ids=str)
def test_two_dimensional_activations(kind, sizes):
    layout = Layout(mesh_with(sizes), **KINDS[kind])

    def flat(p):
        x, image, hidden = (p[name][:, 0] for name in ("x", "image", "hidden"))
        return dict(
            column=dense.column_parallel(x, p["column"], p["column_bias"], layout=layout),
            row=dense.row_parallel(hidden, p["row"], p["row_bias"], layout=layout),
            embed=dense.embed(image, p["embed"], p["row_bias"], layout=layout),
        )

    want = {name: wanted()[0][name][:, 0] for name in ("column", "row", "embed")}
    compare(run(flat, parameters()), want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_axis_of_two_axes(kind, mesh_of):
    mesh = mesh_of(2, 2, 2, names=("data", "x", "y"))
    layout = Layout(mesh, **KINDS[kind], data=("data",), fsdp=None, tensor=("x", "y"))
    got = run(functools.partial(layers, layout=layout), parameters())
    compare(got, wanted()[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_in_another_order(kind, mesh_of):
    """Axes are found by name; embed's kernel is cut over two of them, in the mesh's order."""
    mesh = mesh_of(2, 2, 2, names=("tensor", "data", "fsdp"))
    layout = Layout(mesh, **KINDS[kind])
    got = run(functools.partial(layers, layout=layout), parameters())
    compare(got, wanted()[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_are_whole_over_fsdp(kind):
    layout = Layout(mesh_with((2, 2, 2)), **KINDS[kind], fsdp=None)
    assert layout.column_kernel() == P(None, "tensor")
    got = run(both(functools.partial(layers, layout=layout)), parameters())
    compare(got, wanted(), rtol=1e-4, atol=2e-5)


def test_a_mesh_with_an_axis_that_plays_no_part(mesh_of):
    """It is left to the compiler: shard_map is entered over the layout's axes alone."""
    mesh = mesh_of(2, 2, 2, 2, names=("stage", "data", "fsdp", "tensor"))
    got = run(functools.partial(layers, layout=Layout(mesh)), parameters())
    compare(got, wanted()[0], rtol=1e-4, atol=2e-5)
    x = jax.device_put(parameters()["x"], NamedSharding(mesh, P(None, "stage")))
    layout = Layout(mesh, activations="features")
    y = jax.jit(functools.partial(dense.column_parallel, layout=layout))(x, parameters()["column"])
    assert y.sharding.spec[1] == "stage"  # what it cuts, it goes on cutting


def test_within_a_shard_map_over_that_axis(mesh_of):
    """Stages of a pipeline: each has a kernel of its own, and a layout on what mesh is left."""
    mesh = mesh_of(2, 2, 2, 2, names=("stage", "data", "fsdp", "tensor"))
    x, w = parameters()["x"], parameters()["column"]
    x, w = np.stack([x, -x]), np.stack([w, 2 * w])

    def stage(x, w):
        layout = Layout(jax.sharding.get_abstract_mesh(), algorithm="two_way")
        return dense.column_parallel(x[0], w[0], layout=layout)[None]

    apply = jax.shard_map(
        stage, mesh=mesh, in_specs=P("stage"), out_specs=P("stage"), axis_names={"stage"}
    )

    def loss(function):
        return jax.jit(jax.value_and_grad(lambda w: jnp.sum(jnp.sin(function(x, w)))))

    (y, dw), (z, dz) = loss(apply)(w), loss(functools.partial(jnp.einsum, "tbsd,tdf->tbsf"))(w)
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dw, dz, rtol=1e-4, atol=2e-5)


def test_layers_under_scan_and_remat():
    layout = Layout(mesh_with((2, 1, 4)), algorithm="ring")
    p = parameters()
    stack = [np.stack([p[name], -p[name]]) for name in ("column", "row")]

    def deep(x, column, row, at):
        @jax.checkpoint
        def step(x, w):
            return x + dense.mlp(x, *w, activation=jnp.tanh, layout=at), None

        return jnp.sum(jax.lax.scan(step, x, (column, row))[0] ** 2)

    ours, theirs = (
        jax.jit(jax.value_and_grad(functools.partial(deep, at=at), (0, 1, 2)))(p["x"], *stack)
        for at in (layout, None)
    )
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_layers_under_vmap():
    """An ensemble of kernels, each on the same activations."""
    layout = Layout(mesh_with((2, 1, 4)))
    p = parameters()
    many = np.stack([p["column"], 2 * p["column"]])
    apply = functools.partial(dense.column_parallel, layout=layout)
    y = jax.jit(jax.vmap(apply, in_axes=(None, 0)))(p["x"], many)
    np.testing.assert_allclose(y, np.stack([p["x"] @ w for w in many]), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits(kind, dtype):
    """Results in the operands' dtype, close to those in float32."""
    p = jax.tree.map(lambda x: x.astype(dtype), parameters())
    exact = jax.tree.map(lambda x: x.astype(np.float32), p)
    with jax.numpy_rank_promotion("allow"):
        want = jax.jit(plain)(exact)
    mesh = mesh_with((1, 2, 4))
    layout = Layout(mesh, **KINDS[kind], algorithm="ring", wire_dtype="float32")
    for at in (None, layout):
        got = run(functools.partial(layers, layout=at), p)
        assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
        got = jax.tree.map(lambda x: np.asarray(x).astype(np.float32), got)
        compare(got, want, rtol=0.05, atol=0.05)


MLP = functools.partial(dense.mlp, activation=jnp.tanh)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", lanes_plans(), ids=plan_id)
def test_no_plain_collective_over_tensor_or_fsdp_is_left(plan, kind):
    """Only the sum of the weights' gradients over the data axis, of the size of their shards."""
    named_plan = dict(zip(("backend", "algorithm"), plan, strict=True))
    layout = Layout(mesh_with((2, 2, 2)), **KINDS[kind], **named_plan)
    p = parameters()
    for layer, operands in (
        (dense.column_parallel, ("x", "column")),
        (dense.row_parallel, ("hidden", "row")),
        (MLP, ("x", "column", "row")),
    ):
        operands = [p[name] for name in operands]
        gradient = jax.grad(
            lambda *a, layer=layer: jnp.sum(layer(*a, layout=layout) ** 2), range(len(operands))
        )
        found = named(gradient, *operands)
        assert permutes(found)
        sums = [equation for name in collectives(found) for equation in found[name]]
        assert all(tuple(x.params["axes"]) == ("data",) for x in sums)
        sizes = sorted(x.invars[0].aval.size for x in sums)
        assert sizes == sorted(w.size // 4 for w in operands[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_an_mlp_is_one_gather_and_one_scatter(kind):
    """With one gate or two kernels in: what it sends forwards is two trips round the ring."""
    layout = Layout(mesh_with((2, 1, 4)), **KINDS[kind], algorithm="ring", backend="xla")
    p = parameters()
    for kernel_in in (p["column"], (p["column"], p["up"])):
        found = named(lambda x, w, v: MLP(x, w, v, layout=layout), p["x"], kernel_in, p["row"])
        assert len(permutes(found)) == 2 * 3
        assert len(found["shard_map"]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_hold_no_gathered_kernel(kind):
    """What is kept for the backward pass is the shards of kernels and activations."""
    layout = Layout(mesh_with((1, 4, 2)), **KINDS[kind], algorithm="ring")
    p = parameters()
    gathered = {(D, F // 2), (F // 2, D), (B // 4, S, D)}  # of the kernels and of x, on a device
    places = dict(
        x=layout.activation(3),
        hidden=layout.hidden(3),
        column=layout.column_kernel(),
        row=layout.row_kernel(),
    )
    p = {
        name: jax.device_put(p[name], NamedSharding(layout.mesh, at)) for name, at in places.items()
    }
    for layer, operands in (
        (dense.column_parallel, ("x", "column")),
        (dense.row_parallel, ("hidden", "row")),
        (MLP, ("x", "column", "row")),
    ):
        apply = jax.jit(functools.partial(layer, layout=layout))
        _, pull = jax.vjp(apply, *(p[name] for name in operands))
        kept = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(pull)]
        assert len(kept) >= 2
        assert not gathered & set(kept), layer


def test_a_wire_dtype_is_passed_on():
    layout = Layout(mesh_with((1, 1, 4)), algorithm="ring", wire_dtype="float32")
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((B, S, F), (F, D)))
    found = named(lambda x, w: dense.row_parallel(x, w, layout=layout), x, w)
    assert {str(x.invars[0].aval.dtype) for x in permutes(found)} == {"float32"}


def test_variants_by_replace():
    layout = Layout(mesh_with((2, 2, 2)))
    other = dataclasses.replace(layout, activations="features", algorithm="ring")
    assert (other.mesh, other.algorithm, other.activation(3)) == (
        layout.mesh, "ring", P(("data", "fsdp"), None, "tensor"),
    )  # fmt: skip
    assert hash(layout) != hash(other)


COLUMN, ROW, EMBED = dense.column_parallel, dense.row_parallel, dense.embed
REFUSED = {  # the error, the layer, its operands, and the words of the message
    "a bias of another size": (
        ValueError, COLUMN, lambda p: (p["x"], p["column"], p["row_bias"]), "(16, 24)|(24,)|(16,)",
    ),
    "a row bias of another size": (
        ValueError, ROW, lambda p: (p["hidden"], p["row"], p["column_bias"]),
        "(24, 16)|(16,)|(24,)",
    ),
    "a bias of another rank": (
        ValueError, COLUMN, lambda p: (p["x"], p["split"], p["row_bias"]),
        "(16, 8, 2)|(8, 2)|(16,)",
    ),
    "a sequence that does not split": (
        ValueError, COLUMN, lambda p: (p["x"][:, :6], p["column"]),
        "x|dimension 1|(8, 6, 16)|tensor|4 devices|4 or 8",
    ),
    "a batch that does not split": (
        ValueError, COLUMN, lambda p: (p["x"][:7], p["column"]),
        "x|dimension 0|(7, 8, 16)|4 devices|4 or 8",
    ),
    "hidden units that do not split": (
        ValueError, COLUMN, lambda p: (p["x"], p["column"][:, :23]),
        "kernel|dimension 1|(16, 23)|4 devices|20 or 24",
    ),
    "heads that do not split": (
        ValueError, COLUMN, lambda p: (p["x"], p["split"][:, :2]),
        "kernel|dimension 1|(16, 2, 2)|4 devices|sizes that do are 4",
    ),
    "a width that does not split over fsdp": (
        ValueError, ROW, lambda p: (p["hidden"], p["row"][:, :15]),
        "kernel|dimension 1|(24, 15)|fsdp|2 devices|14 or 16",
    ),
    "an embedding that does not split": (
        ValueError, EMBED, lambda p: (p["image"], p["embed"][:, :12]),
        "kernel|dimension 1|(5, 12)|8 devices|8 or 16",
    ),
    "no sequence to split": (
        ValueError, COLUMN, lambda p: (p["x"][:, 0], p["column"]),
        "2 dimensions|token_dim=0|features",
    ),
    "a kernel for another width": (
        ValueError, COLUMN, lambda p: (p["x"], p["row"]), "(8, 8, 16)|(24, 16)",
    ),
    "a kernel for other heads": (
        ValueError, ROW, lambda p: (p["heads"], p["join"][:4]), "(8, 8, 8, 2)|(4, 2, 16)",
    ),
    "a vector for a kernel": (
        ValueError, ROW, lambda p: (p["hidden"], p["column_bias"]), "(24,)|dimensions",
    ),
    "a dtype apart": (
        TypeError, COLUMN, lambda p: (p["x"], p["column"].astype("float16")),
        "float32|float16|cast",
    ),
    "a bias of another dtype": (
        TypeError, EMBED, lambda p: (p["image"], p["embed"], p["row_bias"].astype("bfloat16")),
        "float32|bfloat16|cast",
    ),
    "fewer biases than kernels": (
        ValueError, COLUMN, lambda p: (p["x"], (p["column"],) * 2, (p["column_bias"],)),
        "2 kernels|1 biases",
    ),
    "fewer arrays than kernels": (
        ValueError, ROW, lambda p: ((p["hidden"],), (p["row"],) * 2), "1 arrays|2 kernels",
    ),
    "sums of different widths": (
        ValueError, ROW, lambda p: ((p["hidden"],) * 2, (p["row"], p["row"][:, :8])),
        "(8, 8, 16)|(8, 8, 8)|agree",
    ),
    "sums of different batches": (
        ValueError, ROW, lambda p: ((p["hidden"], p["hidden"][:1]), (p["row"],) * 2),
        "(8, 8, 16)|(1, 8, 16)|agree",
    ),
    "a gate of another size": (
        ValueError, MLP, lambda p: (p["x"], (p["column"], p["up"][:, :8]), p["row"]),
        "(8, 8, 8)|(24, 16)",
    ),
    "a gate of size one": (
        ValueError, MLP, lambda p: (p["x"], (p["column"], p["up"][:, :1]), p["row"]),
        "(8, 8, 1)|(24, 16)",
    ),
    "three kernels in": (
        ValueError, MLP, lambda p: (p["x"], (p["column"],) * 3, p["row"]), "3|(gate, up)",
    ),
    "kernels of heads in an MLP": (
        ValueError, MLP, lambda p: (p["x"], p["split"], p["join"]), "(16, 8, 2)|2 dimensions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(name):
    """With the numbers and the remedy; without a layout likewise, but for what does not split."""
    error, layer, operands, words = REFUSED[name]
    layout = Layout(mesh_with((2, 2, 4)))
    for at in (layout,) if "split" in name else (layout, None):
        with pytest.raises(error) as caught:
            layer(*operands(parameters()), layout=at)
        assert type(caught.value) is error
        missing = [word for word in words.split("|") if word not in str(caught.value)]
        assert not missing, f"{caught.value} lacks {missing}"


def test_features_that_do_not_split_are_refused():
    layout = Layout(mesh_with((1, 1, 4)), activations="features")
    p = parameters()
    with pytest.raises(ValueError, match=r"x: dimension 2 of \(8, 8, 15\).*4 devices.*12 or 16"):
        COLUMN(p["x"][..., :15], p["column"][:15], layout=layout)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(activations="token"), "'token'|'tokens'|'features'"),
        (dict(token_dim=2), "2|1|0"),
        (dict(tensor="model"), "'model'|('data', 'fsdp', 'tensor')"),
        (dict(fsdp="zero"), "'zero'|('data', 'fsdp', 'tensor')"),
        (dict(data=("data",)), "'fsdp'|('data',)"),
        (dict(tensor="data"), "'data'|both"),
        (dict(tensor=("fsdp", "tensor")), "'fsdp'|both"),
    ],
)
def test_bad_layouts_are_refused(options, words):
    with pytest.raises(ValueError) as caught:
        Layout(mesh_with((2, 2, 2)), **options)
    missing = [word for word in words.split("|") if word not in str(caught.value)]
    assert not missing, f"{caught.value} lacks {missing}"


def test_names_that_cannot_be_honoured_are_refused():
    p = parameters()
    mesh = mesh_with((2, 2, 2))
    for error, options in (
        (ValueError, dict(algorithm="rng")),
        (ValueError, dict(backend="xl")),
        (NotImplementedError, dict(algorithm="ring", backend="unfused")),
    ):
        with pytest.raises(error):
            MLP(p["x"], p["column"], p["row"], layout=Layout(mesh, **options))


def test_a_single_data_axis_may_be_a_name(mesh_of):
    """As a tuple of one; a string is no tuple of its letters."""
    mesh = mesh_of(2, 4, names=("data", "tensor"))
    layout = Layout(mesh, data="data", fsdp=None)
    assert layout == Layout(mesh, data=("data",), fsdp=None)


def test_meshes_have_their_axes_in_an_order_that_layouts_find():
    mesh = mesh_with((2, 2, 2))
    assert isinstance(mesh, Mesh)
    layout = Layout(mesh)
    assert [layout.size(x) for x in ("tensor", ("data", "fsdp"), None)] == [2, 4, 1]

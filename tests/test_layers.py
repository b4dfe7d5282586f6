"""`dense.layers`: a stack of residual blocks, its weights fetched ahead, against a plain loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.predicted.slices import SMALLEST, tpu_slice
from collective_matmul import Layout, compiler_options, dense, make_mesh
from collective_matmul.inspect import overlap_report

from .helpers import named, needs_compiler, quick

B, S, D, N = 8, 8, 16, 3


def mesh_of(sizes, **options):
    return make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)], **options)


def operands(depth=N, dtype=np.float32):
    """x, and a stack of parameters."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(0.5 * rng.normal(size=shape) / np.sqrt(shape[-2]), dtype)

    parameters = {
        "norm": 1 + normal(depth, 1, D)[:, 0],
        "heads": normal(depth, D, 4, 6),
        "up": normal(depth, D, 8),
        "scale": normal(depth, 1, 8)[:, 0],
        "out": normal(depth, 4, 6, D),
        "down": normal(depth, 8, D),
        "bias": normal(depth, 1, D)[:, 0],
    }
    return normal(B, S, D), parameters


def specs(layout):
    return {
        "norm": P(),
        "heads": P(None, *layout.column_kernel(3)),
        "up": P(None, *layout.column_kernel()),
        "scale": P(None, *layout.column_bias()),
        "out": P(None, *layout.row_kernel(3)),
        "down": P(None, *layout.row_kernel()),
        "bias": P(),
    }


def parts(p):
    return dense.Parts(
        (p["heads"], p["up"]), (p["out"], p["down"]), p["bias"], p["norm"], p["scale"]
    )


def before(x, norm):
    return jnp.tanh(x) * norm[None, None]


def middle(wide, scale):
    """The heads' columns as they are, the others through a sine."""
    cut = wide.shape[-1] - scale.shape[0]
    return jnp.concatenate([wide[..., :cut], jnp.sin(wide[..., cut:]) * scale[None, None]], axis=-1)


def layers(layout, x, parameters, **options):
    options = {"parts": parts, "before": before, "middle": middle} | options
    where = None if layout is None else specs(layout)
    return dense.layers(x, parameters, specs=where, layout=layout, **options)


def plainly(x, parameters):
    """The same by einsums, layer by layer."""
    for i in range(parameters["norm"].shape[0]):
        p = jax.tree.map(lambda a, i=i: a[i], parameters)
        y = before(x, p["norm"])
        heads = jnp.einsum("bsd,dhk->bshk", y, p["heads"])
        units = jnp.sin(jnp.einsum("bsd,df->bsf", y, p["up"])) * p["scale"][None, None]
        total = jnp.einsum("bshk,hkd->bsd", heads, p["out"]) + jnp.einsum(
            "bsf,fd->bsd", units, p["down"]
        )
        x = x + total + p["bias"][None, None]
    return x


def with_gradients(function, *arguments):
    def loss(x, parameters):
        y = function(x, parameters)
        return jnp.sum(jnp.sin(y)), y

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    return jax.jit(run, compiler_options=quick())(*arguments)


@functools.cache
def wanted(depth):
    return jax.tree.map(np.asarray, with_gradients(plainly, *operands(depth)))


def check(layout, depth=N, **options):
    found = with_gradients(functools.partial(layers, layout, **options), *operands(depth))
    for ours, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted(depth)), strict=True):
        np.testing.assert_allclose(ours, other, rtol=2e-5, atol=5e-5)


LAYOUTS = {
    "tokens": ((2, 2, 2), {}),
    "rows": ((1, 2, 4), {"token_dim": 0}),
    "no data axis beside": ((1, 4, 2), {}),
    "tensor of 4": ((1, 2, 4), {}),
    "fsdp alone": ((2, 4, 1), {}),
    "tensor alone": ((2, 1, 4), {"fsdp": None, "data": ("data", "fsdp")}),
    "fsdp of one device": ((2, 1, 4), {}),
}


def layout_of(name, **options):
    sizes, own = LAYOUTS[name]
    return Layout(mesh_of(sizes), **own, **options)


def test_one_device():
    check(None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name):
    check(layout_of(name))


@pytest.mark.parametrize("depth", [1, 2])
def test_few_layers(depth):
    check(layout_of("tokens"), depth)


@pytest.mark.parametrize("algorithm", ["ring", "bidirectional", "two_way", "direct"])
@pytest.mark.parametrize("name", ["no data axis beside", "tensor of 4"])
def test_every_schedule(name, algorithm):
    check(layout_of(name, algorithm=algorithm))


@pytest.mark.parametrize("backend", ["unfused", "xla+checked"])
def test_backends_without_steps(backend):
    check(layout_of("tokens", backend=backend))


def test_explicit_meshes():
    mesh = mesh_of((2, 2, 2), axis_types=AxisType.Explicit)
    with jax.set_mesh(mesh):
        check(Layout(mesh))


def test_a_middle_that_reads_where_the_wide_product_lies():
    def gradient(slab, scale, dy):
        return jax.vjp(middle, slab.read(), scale)[1](dy)

    in_place = dense.InPlace(lambda slab, scale: middle(slab.read(), scale), gradient)
    for layout in (layout_of("tokens"), layout_of("fsdp alone"), None):
        check(layout, middle=in_place)


def test_unchecked_types():
    check(layout_of("tokens"), check_vma=False)


def test_in_bfloat16_gradients_are_as_of_layers_one_by_one():
    """Where nothing is fetched ahead: the same products, rounded at the same places."""
    x, parameters = operands(dtype=jnp.bfloat16)
    ahead = with_gradients(functools.partial(layers, layout_of("tokens")), x, parameters)
    alone = with_gradients(functools.partial(layers, None), x, parameters)
    exact = jax.tree.leaves(wanted(N))
    for ours, theirs, want in zip(*map(jax.tree.leaves, (ahead, alone)), exact, strict=True):
        off, reference = (
            np.abs(np.asarray(found, np.float64) - want).max() for found in (ours, theirs)
        )
        assert off <= 2 * reference + 0.02 * np.abs(want).max()


def test_weights_travel_beside_products():
    """Each trip's hops over fsdp are tied to its products; none is left to the scan's end."""
    x, parameters = operands()
    layout = layout_of("no data axis beside", algorithm="ring")
    run = jax.grad(lambda x, p: jnp.sum(layers(layout, x, p)), (0, 1))
    ties = named(run, x, parameters)["optimization_barrier"]
    # Kernels in and out, four devices: two rounds of a fetch, or a sum, can follow a product of the
    # two (tensor = 2) times two (in and out); the first round needs no tie.
    assert len(ties) >= 8


@needs_compiler
def test_on_tpu_what_travels_over_fsdp_is_hidden():
    """Within the scans; the first fetch and the last sum have nothing to be beside."""
    devices = tpu_slice("v4:2x2x2")
    mesh = make_mesh(1, 4, 2, devices=devices)
    layout, d, f, depth = Layout(mesh, token_dim=0), 4096, 8192, 2
    where = {"up": P(None, *layout.column_kernel()), "down": P(None, *layout.row_kernel())}

    def placed(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    def loss(x, parameters):
        y = dense.layers(
            x,
            parameters,
            parts=lambda p: dense.Parts((p["up"],), (p["down"],)),
            before=lambda x, _: x,
            middle=lambda wide, _: jax.nn.relu(wide),
            specs=where,
            layout=layout,
        )
        return jnp.sum(y.astype(jnp.float32))

    arrays = {
        "up": placed((depth, d, f), where["up"]),
        "down": placed((depth, f, d), where["down"]),
    }
    x = placed((64, 256, d), layout.activation(3))
    step = jax.jit(jax.grad(loss, (0, 1)), compiler_options=compiler_options(mesh))
    report = overlap_report(step.lower(x, arrays).compile(), chip="v4", mesh=mesh)
    collectives = [x for x in report.timeline.transfers if x.collective is not None]
    hops = [x for x in collectives if x.count == depth and x.traffic.route.axes == "fsdp"]
    # Two kernels, forwards, backwards and their sums: six journeys of at least three hops each.
    assert len(hops) >= 18
    exposed, hidden = (sum(getattr(hop, name) for hop in hops) for name in ("exposed", "hidden"))
    assert exposed < 0.05 * (exposed + hidden)
    # No piece of a kernel is copied out of the way of one that arrives.
    loops = [op.instruction for op in report.timeline.ops if op.count == depth]
    assert not [x.name for x in loops if x.opcode == "copy" and len(x.result[0].shape) == 2]


def test_what_is_wrong_is_refused_with_its_numbers():
    x, parameters = operands()
    layout = layout_of("tokens")
    with pytest.raises(ValueError, match="2, 3"):
        layers(layout, x, parameters | {"up": parameters["up"][:2]})
    with pytest.raises(ValueError, match="none"):
        layers(layout, x, parameters | {"bias": jnp.zeros(())})
    with pytest.raises(TypeError, match="bfloat16"):
        layers(layout, x.astype(jnp.bfloat16), parameters)
    with pytest.raises(ValueError, match="15"):
        layers(layout, x, parameters | {"up": jnp.zeros((N, 15, 8))})
    with pytest.raises(ValueError, match="does not split over"):
        layers(layout, x[:6, :3], parameters)
    for options in ({"activations": "features"}, {"partitioner": "gspmd"}):
        with pytest.raises(NotImplementedError, match="column_parallel"):
            layers(layout_of("tokens", **options), x, parameters)


def test_the_compiler_is_told_only_where_it_knows_the_words():
    assert compiler_options(None) == compiler_options(mesh_of((2, 2, 2))) == {}


@needs_compiler
@pytest.mark.parametrize("chip", ["v4", "v5p", "v6e"])
def test_the_compiler_knows_the_words_that_it_is_told(chip):
    mesh = make_mesh(tensor=4, devices=tpu_slice(SMALLEST[chip]))
    options = compiler_options(mesh)
    assert "xla_max_concurrent_async_collective_permutes" in options
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, P("tensor")))
    jax.jit(jnp.sin, compiler_options=options).lower(x).compile()

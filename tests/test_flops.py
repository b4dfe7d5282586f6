"""FLOPs from jaxprs: what is counted is exact, what cannot be counted is listed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.sharding import PartitionSpec as P

from bench.flops import count, count_jaxpr
from bench.work import closed_form, hardware_work, model_work
from collective_matmul import Layout, make_mesh
from models import step, vit
from models.capture import Capture
from models.configs.digits import CONFIG


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


SQUARE = shape(8, 8)
ONE = 2 * 8**3  # FLOPs of the product of two squares


def square(x):
    return x @ x


@pytest.mark.parametrize(
    "spec, lhs, rhs, flops",
    [
        ("mk,kn->mn", (3, 5), (5, 7), 2 * 3 * 5 * 7),
        ("bmk,bkn->bmn", (2, 3, 5), (2, 5, 7), 2 * 2 * 3 * 5 * 7),
        ("mkl,lkn->nm", (3, 5, 4), (4, 5, 7), 2 * 3 * 5 * 4 * 7),
        ("m,n->mn", (3,), (7,), 2 * 3 * 7),
    ],
)
def test_a_product_is_two_flops_a_multiplication(spec, lhs, rhs, flops):
    counted = count(functools.partial(jnp.einsum, spec), shape(*lhs), shape(*rhs))
    assert counted.flops == flops and not counted.uncounted


def test_a_complex_product_is_eight():
    assert count(square, shape(8, 8, dtype=jnp.complex64)).flops == 4 * ONE


def test_a_ragged_product_multiplies_every_row_once():
    groups = shape(4, dtype=jnp.int32)
    assert count(lax.ragged_dot, shape(10, 5), shape(4, 5, 7), groups).flops == 2 * 10 * 5 * 7


CONVOLUTIONS = {
    "patches": ((2, 28, 28, 3), (14, 14, 3, 8), {"window_strides": (14, 14), "padding": "VALID"}),
    "same": ((2, 9, 8, 4), (3, 3, 4, 6), {"window_strides": (1, 1), "padding": "SAME"}),
    "strided": (
        (2, 9, 8, 4),
        (3, 3, 4, 6),
        {"window_strides": (2, 3), "padding": [(1, 2), (0, 1)]},
    ),
    "dilated": (
        (1, 9, 8, 4),
        (3, 2, 4, 6),
        {
            "window_strides": (1, 2),
            "padding": [(2, 2), (1, 0)],
            "lhs_dilation": (2, 1),
            "rhs_dilation": (1, 3),
        },
    ),
    "grouped": (
        (2, 9, 8, 4),
        (3, 3, 1, 8),
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4},
    ),
    "batch groups": (
        (4, 6, 6, 3),
        (3, 3, 3, 8),
        {"window_strides": (1, 1), "padding": "VALID", "batch_group_count": 2},
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_counts_as_xla_counts_it_and_its_gradients_as_much(name):
    images, kernel, options = CONVOLUTIONS[name]

    def convolve(x, k):
        return lax.conv_general_dilated(x, k, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

    args = shape(*images), shape(*kernel)
    forward = count(convolve, *args)
    assert forward.flops == jax.jit(convolve).lower(*args).cost_analysis()["flops"]
    for argument in (0, 1):  # the sum is linear, so its gradient is one convolution
        gradient = jax.grad(lambda x, k: jnp.sum(convolve(x, k)), argnums=argument)
        assert count(gradient, *args).flops == forward.flops


def test_calls_run_once_and_scans_their_length():
    @jax.custom_jvp
    def with_jvp(x):
        return x @ x

    with_jvp.defjvps(lambda t, _, x: t @ x)

    def program(x):
        x = jax.jit(square)(x)
        x = jax.checkpoint(square)(x)
        x = with_jvp(x)
        x, _ = lax.scan(lambda x, _: (lax.fori_loop(0, 3, lambda _, y: y @ y, x), None), x, None, 5)
        return jax.vmap(square)(jnp.stack([x, x]))

    counted = count(program, SQUARE)
    assert counted.flops == (3 + 5 * 3 + 2) * ONE
    assert not counted.uncounted and not counted.remarks
    assert count_jaxpr(jax.jit(program).trace(SQUARE).jaxpr) == counted


def test_a_gradient_counts_the_rules_of_a_custom_vjp():
    @jax.custom_vjp
    def power(x):
        return x @ x

    power.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x @ x @ x,))
    assert count(power, SQUARE).flops == ONE
    assert count(jax.grad(lambda x: jnp.sum(power(x) ** 2)), SQUARE).flops == (1 + 3) * ONE


def test_what_no_output_needs_is_not_counted():
    assert count(lambda x: (jax.jit(lambda y: (y @ y, y + 1))(x))[1], SQUARE).flops == 0


def test_the_dearest_branch_of_a_cond_counts_and_is_said():
    def program(x, wanted):
        return lax.switch(wanted, [lambda x: x, square, lambda x: x @ x @ x], x)

    counted = count(program, SQUARE, shape(dtype=jnp.int32))
    assert counted.flops == 2 * ONE
    said = "a cond has branches of 0 or 1,024 or 2,048 FLOPs; the dearest is counted"
    assert counted.remarks == (said,)
    assert f"remark: {said}" in str(counted)


def test_a_while_is_listed_unless_nothing_in_it_multiplies():
    def until(body):
        return lambda x: lax.while_loop(lambda x: x[0, 0] < 1, body, x)

    counted = count(
        lambda x: lax.scan(lambda x, _: (until(square)(x), None), x, None, 5)[0], SQUARE
    )
    assert counted.flops == 0
    (what,) = counted.uncounted
    assert "1,024 FLOPs a trip" in what and counted.uncounted[what] == 5
    assert f"not counted: {what}, 5 times" in str(counted)
    assert not count(until(lambda x: x + 1), SQUARE).uncounted


def kernel(cost, calls=1):
    def program(x):
        for _ in range(calls):
            x = pl.pallas_call(
                lambda x, y: y.__setitem__(..., x[...] @ x[...]),
                out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
                cost_estimate=cost,
                name="squares",
            )(x)
        return x

    return program


def test_a_kernel_counts_what_it_declares():
    cost = pl.CostEstimate(flops=123, transcendentals=0, bytes_accessed=0)
    counted = count(kernel(cost, calls=2), SQUARE)
    assert counted.flops == 246 and not counted.uncounted
    assert "as its kernels declare" in counted.convention
    assert "as its kernels declare" not in count(square, SQUARE).convention


def test_a_kernel_that_declares_nothing_is_listed():
    counted = count(kernel(None, calls=2), SQUARE)
    assert counted.flops == 0
    assert counted.uncounted == {"pallas_call squares, a kernel without a cost_estimate": 2}


def test_a_custom_call_and_an_unknown_primitive_are_listed():
    def called(x):
        return jax.ffi.ffi_call("my_gemm", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    assert list(count(called, SQUARE).uncounted) == [
        "ffi_call my_gemm, whose products are not known"
    ]
    new = Primitive("fused_attention")
    new.def_abstract_eval(lambda x: x)
    assert list(count(new.bind, SQUARE).uncounted) == [
        "fused_attention, whose products are not known"
    ]
    assert "pure_callback" in str(count(lambda x: jax.pure_callback(lambda y: y, x, x), SQUARE))


@pytest.mark.parametrize(
    "function", [jnp.linalg.cholesky, jnp.linalg.eigh, jnp.linalg.svd, jnp.linalg.inv, jnp.fft.fft]
)
def test_decompositions_and_transforms_are_listed(function):
    assert count(function, SQUARE).uncounted


def test_a_solver_that_runs_its_products_nobody_knows_how_often_is_listed():
    def solve(a, b):
        return lax.custom_linear_solve(lambda x: a @ x, b, lambda matvec, x: matvec(x))

    (what,) = count(solve, SQUARE, SQUARE).uncounted
    assert what == "custom_linear_solve, which runs products an unknown number of times"


def test_shard_map_counts_all_devices(mesh_of):
    """Per-device shapes times the manual axes; work that devices repeat counts as it is done."""
    mesh = mesh_of(2, 4, names=("a", "b"))
    x = shape(16, 8)

    def over(in_specs, body=lambda x, y: x @ y, **options):
        return count(jax.shard_map(body, mesh=mesh, in_specs=in_specs, **options), x, SQUARE).flops

    whole = 2 * 16 * 8 * 8
    rows = {"in_specs": (P(("a", "b")), P()), "out_specs": P(("a", "b"))}
    assert over(**rows) == whole
    assert over(in_specs=(P("a"), P()), out_specs=P("a")) == 4 * whole
    assert over(in_specs=(P("a"), P()), out_specs=P("a"), axis_names={"a"}) == whole

    def outer(x, y):
        inner = {"in_specs": (P("b"), P()), "out_specs": P("b"), "axis_names": {"b"}}
        return jax.shard_map(jnp.matmul, **inner)(x, y)

    assert over(in_specs=(P("a"), P()), out_specs=P("a"), axis_names={"a"}, body=outer) == whole


def test_what_multiplies_nothing_is_not_listed(mesh_of):
    def program(seed, x):
        a, b, c = jax.random.split(jax.random.key(seed), 3)
        y = jax.random.normal(a, x.shape) + jax.random.gamma(b, 2.0, x.shape)
        y = jnp.sort(y) + jax.random.permutation(c, jnp.cumsum(x, 0)) + jax.nn.gelu(x)
        y = y.at[0].add(1.0) + lax.reduce_window(y, 0.0, lax.add, (3, 3), (1, 1), "SAME")
        return jax.ops.segment_sum(jax.nn.softmax(y), jnp.arange(8), 8) + lax.top_k(y, 8)[0]

    def collectives(x):
        whole = lax.all_gather(x, "t", tiled=True)
        x = lax.psum_scatter(whole, "t", tiled=True) + lax.pmean(x, "t") + lax.pmax(x, "t")
        return lax.all_to_all(lax.ppermute(x, "t", [(0, 1)]), "t", 1, 1, tiled=True)

    spread = jax.shard_map(collectives, mesh=mesh_of(4), in_specs=P("t"), out_specs=P("t"))
    for counted in (
        count(program, shape(dtype=jnp.int32), SQUARE),
        count(jax.grad(lambda x, seed: jnp.sum(program(seed, x))), SQUARE, shape(dtype=jnp.int32)),
        count(spread, SQUARE),
    ):
        assert counted.flops == 0 and not counted.uncounted


def test_counts_add_by_product():
    counted = count(lambda x: (x @ x) @ x, SQUARE)
    assert list(counted.products.values()) == [2 * ONE]
    assert "float32[8,8] . float32[8,8]" in str(counted)
    assert counted.convention in str(counted).splitlines()[0]


LENGTH, WIDTH, MLP, DEPTH, CLASSES = 256, 6144, 24576, 48, 29_593
MATRICES = DEPTH * (4 * WIDTH**2 + 2 * WIDTH * MLP)


def vit_22b(batch=1, layout=None, **changes):
    """The abstract model and batch: nothing of its 22 billion parameters exists."""
    config = vit.variant("22B/14", num_classes=CLASSES, **changes)
    model = nnx.eval_shape(lambda: vit.ViT(config, layout=layout, rngs=nnx.Rngs(0)))
    return model, shape(batch, 224, 224, 3, dtype=jnp.bfloat16)


def gradient(model, images):
    graph, params = nnx.split(model)
    return count(jax.grad(lambda p, x: jnp.sum(nnx.merge(graph, p)(x) ** 2)), params, images)


def test_vit_22b_is_its_closed_form_and_three_small_parts():
    """131.366 GFLOP a token in the blocks, all that the closed form knows; 131.853 in the model."""
    model, images = vit_22b()
    silent = Capture(lambda _: False)
    tokens = shape(1, LENGTH, WIDTH, dtype=jnp.bfloat16)
    whole = count(lambda m, x: m(x), model, images).flops
    parts = {
        "blocks": count(lambda m, x: m.encoder(x, silent), model, tokens).flops,
        "embedding": count(lambda m, x: m.embedding(vit.patches(x, 14)), model, images).flops,
        "pooling": count(lambda m, x: m.pool(x, silent), model, tokens).flops,
        "classifier": count(lambda m, x: m.head(x[:, 0]), model, tokens).flops,
    }
    assert sum(parts.values()) == whole
    assert parts["embedding"] == 2 * LENGTH * 14 * 14 * 3 * WIDTH
    # One query a picture, but keys and values of all its tokens.
    products = 2 * LENGTH * WIDTH**2 + 2 * WIDTH**2 + 2 * WIDTH * MLP
    assert parts["pooling"] == 2 * products + 4 * LENGTH * WIDTH
    assert parts["classifier"] == 2 * WIDTH * CLASSES

    form = closed_form(
        MATRICES, layers=DEPTH, heads=48, head_dim=128, length=LENGTH, attention="full"
    )
    assert 3 * parts["blocks"] == form.flops * LENGTH
    a_token = {name: 3 * flops / LENGTH / 1e9 for name, flops in parts.items()}
    assert a_token == pytest.approx(
        {"blocks": 131.366, "embedding": 0.022, "pooling": 0.462, "classifier": 0.004}, abs=6e-4
    )


@pytest.mark.parametrize("sizes", [(1, 1, 16), (2, 2, 4)])
@pytest.mark.parametrize("activations", ["tokens", "features"])
def test_a_mesh_multiplies_what_one_device_does(sizes, activations):
    """Of ViT-22B, forward and gradient; so nothing is done twice, on any of these meshes."""
    layout = Layout(make_mesh(*sizes), activations=activations, algorithm="two_way")
    alone, spread = vit_22b(16), vit_22b(16, layout)
    for program in (lambda *args: count(lambda m, x: m(x), *args), gradient):
        counted = program(*spread)
        assert counted.flops == program(*alone).flops
        assert not counted.uncounted and not counted.remarks


def test_rematerialisation_is_hardware_flops_and_no_model_flops():
    """ "full" runs each block again, up to the two products that nothing in it needs."""
    plain, full, dots = (gradient(*vit_22b(remat=name)) for name in (None, "full", "dots"))
    again = DEPTH * 2 * LENGTH * (3 * WIDTH**2 + WIDTH * MLP + 2 * LENGTH * WIDTH)
    assert full.flops - plain.flops == again
    assert dots.flops == plain.flops
    forward = {
        name: count(lambda m, x: m(x), *vit_22b(remat=name)).flops for name in (None, "full")
    }
    assert forward["full"] == forward[None]
    # All that the gradient of a step leaves out is that of the images.
    images = 2 * LENGTH * 14 * 14 * 3 * WIDTH
    model = model_work(count(lambda m, x: m(x), *vit_22b()))
    assert model.flops - plain.flops == images
    assert hardware_work(full).flops == full.flops
    assert (model.kind, hardware_work(full).kind) == ("model", "hardware")


def test_nothing_of_a_real_training_step_is_uncounted():
    """Optimiser, schedule, loss and metrics hold no product, and nothing that is not known."""
    graph, state = step.abstract(dataclasses.replace(CONFIG, batch=16), None)
    batch = {"image": shape(16, 8, 8, 1), "label": shape(16, dtype=jnp.int32)}
    update = functools.partial(step.train_step, graph=graph, config=CONFIG, places=None)
    counted = count(update, state, batch)
    forward = count(lambda p, x: nnx.merge(graph, p)(x), state.params, batch["image"])
    embedding = 2 * 16 * 16 * CONFIG.model.patch_dim * CONFIG.model.width
    assert counted.flops == model_work(forward).flops - embedding
    assert not counted.uncounted and not counted.remarks

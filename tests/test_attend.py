"""Attention by one kernel: the same numbers as by the compiler's operations, also in blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from bench.flops import count
from bench.predicted.regression import SLICES
from bench.predicted.slices import tpu_slice
from collective_matmul import Layout, make_mesh
from models import vit
from models.attend import attend, pallas_tpu
from models.capture import Capture
from models.norm import Norm

from .helpers import needs_compiler
from .vits import apply, compiled, images, parameters
from .vits import with_gradients as of_model

pytestmark = pytest.mark.slow

EPSILON = 1e-6


def mesh_of(sizes, **options):
    return make_mesh(*sizes, devices=jax.devices()[:8], **options)


def unseen(_):
    return False


def operands(shape, dtype=np.float32, seed=0):
    """Queries, keys, values, the cotangent of the result, and the norms' two scales."""
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4)]
    scales = [jnp.asarray(1 + 0.3 * rng.normal(size=shape[-1]), jnp.float32) for _ in range(2)]
    return *arrays, scales


def function(choice, kind, layout=None):
    """`(query, key, value, scales) -> attention`."""

    def run(query, key, value, scales):
        norms = None
        if kind:
            norms = tuple(
                Norm(kind, query.shape[-1], use_bias=False, epsilon=EPSILON) for _ in range(2)
            )
            for norm, scale in zip(norms, scales, strict=True):
                norm.scale = nnx.Param(scale)
        return attend(
            query, key, value, norms, choice=choice, layout=layout, capture=Capture(unseen)
        )

    return run


def both(choice, kind, layout=None):
    """`arrays -> (attention, gradients)`, not compiled."""

    def run(arrays):
        *inputs, cotangent, scales = arrays
        y, backward = jax.vjp(function(choice, kind, layout), *inputs, scales)
        return y, backward(cotangent)

    return run


def with_gradients(choice, kind, arrays, layout=None):
    return compiled(both(choice, kind, layout))(arrays)


def exactly(kind, arrays):
    """The attention in float64, by numpy."""
    query, key, value, _, scales = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)

    def normed(x, scale):
        if kind is None:
            return x
        x = x - x.mean(-1, keepdims=True) if kind == "ln" else x
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + EPSILON) * scale

    query, key = normed(query, scales[0]), normed(key, scales[1])
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, value)


def error(found, wanted):
    """The largest difference, as a part of the largest number."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("kind", [None, "ln", "rms"])
@pytest.mark.parametrize("shape", [(2, 128, 2, 128), (1, 384, 1, 128), (1, 256, 2, 256)])
def test_the_kernel_and_its_gradient(kind, shape):
    """Against float64, and against the compiler's own gradient of the same formula."""
    arrays = operands(shape)
    y, gradients = with_gradients("pallas_tpu", kind, arrays)
    assert error(y, exactly(kind, arrays)) < 1e-5
    _, wanted = with_gradients("xla", kind, arrays)
    for found, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert not np.any(other) or error(found, other) < 1e-5


def test_in_bfloat16_it_rounds_no_more_than_the_compiler_does():
    arrays = operands((2, 256, 2, 128), jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    wanted = jax.tree.leaves(with_gradients("xla", "rms", wide))
    ours = jax.tree.leaves(with_gradients("pallas_tpu", "rms", arrays))
    theirs = jax.tree.leaves(with_gradients("xla", "rms", arrays))
    for exact, found, other in zip(wanted, ours, theirs, strict=True):
        assert error(found, exact) < 1.5 * error(other, exact) + 1e-3


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_every_device_has_its_heads(types):
    layout = Layout(mesh_of((2, 2, 2), axis_types=(types,) * 3))
    arrays = operands((4, 128, 4, 128))
    with jax.sharding.set_mesh(layout.mesh):
        found = with_gradients("pallas_tpu", "rms", arrays, layout)
    wanted = with_gradients("xla", "rms", arrays)
    for ours, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert error(ours, other) < 1e-5


@pytest.mark.parametrize(
    ("query", "key", "why"),
    [
        ((1, 1, 2, 128), (1, 128, 2, 128), "there are 1 queries of 128 tokens"),
        ((1, 128, 2, 64), (1, 128, 2, 64), "head_dim=64 is not a multiple of 128"),
        ((1, 100, 2, 128), (1, 100, 2, 128), "100 tokens are not a multiple of 128"),
        ((1, 1024, 1, 128), (1, 1024, 1, 128), "1024 tokens of 128 .* do not fit on chip; 768 do"),
    ],
)
def test_what_the_kernel_cannot_do_it_refuses_by_name(query, key, why):
    def run(choice):
        q, k = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (query, key))
        return jax.eval_shape(function(choice, None), q, k, k, [])

    with pytest.raises(NotImplementedError, match=why):
        run("pallas_tpu")
    assert run(None).shape == query


BLOCKS = vit.Config(
    width=512,
    depth=2,
    mlp_dim=1024,
    heads=4,
    patch_size=4,
    image_size=(32, 64),
    num_classes=10,
    dtype="float32",
    parallel=True,
    style=vit.VIT_22B,
)


SPREAD = 0.05  # of the parameters: wide layers, so that logits are of order 1


def trained(layout=None, **changes):
    """Logits and gradients of the parallel blocks."""
    run = compiled(of_model(dataclasses.replace(BLOCKS, **changes), layout))
    return jax.tree.map(np.asarray, run(parameters(BLOCKS, SPREAD), images(BLOCKS)))


@functools.cache
def plainly():
    return trained(attention="xla")


@pytest.mark.parametrize(
    ("sizes", "options", "remat"),
    [
        (None, {}, None),
        (None, {}, "products"),
        ((2, 2, 2), {}, "products"),
        ((2, 2, 2), {}, "full"),
        ((1, 4, 2), {"activations": "features"}, "products"),
        ((2, 1, 4), {"token_dim": 0}, "dots"),
        ((2, 4, 1), {}, "products"),
    ],
)
def test_the_parallel_block_side_by_side(sizes, options, remat):
    """One product in, one out, and kernels that work in place between: the same numbers."""
    layout = sizes and Layout(mesh_of(sizes), **options)
    (y, gradients), (wanted, others) = (
        trained(layout, attention="pallas_tpu", remat=remat),
        plainly(),
    )
    assert error(y, wanted) < 1e-5
    for found, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        assert np.abs(other).max() < 1e-5 or error(found, other) < 1e-5


def test_what_is_to_be_seen_of_it_takes_the_other_way():
    """Logits exist only outside the kernel."""
    state, x = parameters(BLOCKS, SPREAD), images(BLOCKS, batch=1)
    named = dataclasses.replace(BLOCKS, attention="pallas_tpu")
    asked = ("block_0/attention_logits", "block_1/mlp_hidden")
    with pytest.raises(NotImplementedError, match="it never makes attention_logits"):
        apply(named, capture=asked)(state, x)
    _, found = jax.eval_shape(apply(named, capture=("block_1/mlp_hidden",)), state, x)
    assert found["block_1/mlp_hidden"].shape == (1, 128, 1024)
    _, found = jax.eval_shape(apply(BLOCKS, capture=asked), state, x)
    assert found["block_0/attention_logits"].shape == (1, 4, 128, 128)


def test_its_flops_are_those_of_its_products():
    """4 s^2 d a head forwards, 10 backwards, where weights are computed again."""
    arrays = operands((2, 128, 2, 128))
    counted = count(both("pallas_tpu", "rms"), arrays)
    assert counted.flops == 2 * 2 * 128**2 * 128 * (4 + 10)
    assert not counted.uncounted


@needs_compiler
@pytest.mark.parametrize("chip", SLICES)
def test_on_tpu_nobody_has_to_ask_for_it(chip):
    """Compiled for every generation; `attention="xla"` leaves it out."""
    devices = tpu_slice(SLICES[chip][0])
    layout = Layout(make_mesh(-1, 1, 2, devices=devices), token_dim=0)

    def kernels(choice):
        def loss(arrays):
            y = function(choice, "rms", layout)(*arrays[:3], arrays[4])
            return jnp.sum(y.astype(jnp.float32))

        def placed(x, at):
            place = jax.sharding.NamedSharding(layout.mesh, at)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

        q, k, v, g, scales = operands((4, 256, 4, 128), jnp.bfloat16)
        hidden = layout.hidden(4, 3)
        arrays = [placed(x, hidden) for x in (q, k, v, g)]
        arrays.append([placed(x, jax.P()) for x in scales])
        text = jax.jit(jax.grad(loss)).lower(arrays).compile().as_text()
        return text.count('custom_call_target="tpu_custom_call"')

    assert kernels(None) == 1  # the forward pass of a sum is dead
    assert kernels("xla") == 0


@needs_compiler
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p"])
def test_the_largest_heads_that_it_accepts_compile(chip, dtype):
    """On the chips whose kernels have the least memory."""
    devices = tpu_slice(SLICES[chip][0])
    place = jax.sharding.NamedSharding(make_mesh(-1, 1, 1, devices=devices), jax.P())
    s = pallas_tpu.MOST_BYTES // (128 * jnp.dtype(dtype).itemsize)
    x = jax.ShapeDtypeStruct((1, s, 2, 128), dtype, sharding=place)
    assert pallas_tpu.refusal(x, x) is None
    assert pallas_tpu.refusal(*[jax.ShapeDtypeStruct((1, s + 128, 2, 128), dtype)] * 2)
    kernel = pallas_tpu.Kernel(2, 128, centred=False, epsilon=EPSILON, interpret=False)
    scale = jax.ShapeDtypeStruct((1, 128), jnp.float32, sharding=place)

    def loss(x, scale):
        flat = x.reshape(1, s, -1)
        y = pallas_tpu.attend(kernel, flat, flat, flat, pallas_tpu.Scales(scale, scale))
        return jnp.sum(y.astype(jnp.float32))

    on_all = jax.shard_map(
        jax.grad(loss, (0, 1)),
        mesh=place.mesh,
        in_specs=jax.P(),
        out_specs=jax.P(),
        check_vma=False,
    )
    assert "tpu_custom_call" in jax.jit(on_all).lower(x, scale).compile().as_text()

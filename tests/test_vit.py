"""The vision transformers: one set of parameters, one answer, wherever it is computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

from collective_matmul import Layout, make_mesh, nn
from models import vit
from models.attention import Attention
from models.capture import Capture
from models.norm import Norm
from models.position import resample

from .helpers import named, permutes
from .vits import apply, compiled, images, parameters, with_gradients

pytestmark = pytest.mark.slow

TINY = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 8, "patch_size": 4, "image_size": 16,
        "num_classes": 10, "dtype": "float32"}  # fmt: skip
STANDARD = vit.Config(**TINY)
PARALLEL = dataclasses.replace(STANDARD, parallel=True, style=vit.VIT_22B)


def layout_of(sizes, **options):
    return Layout(make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)]), **options)


@functools.cache
def expected(config):
    """Parameters, images, and what one device makes of them."""
    state, x = parameters(config), images(config)
    return state, x, jax.tree.map(np.asarray, compiled(with_gradients(config))(state, x))


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def check(config, layout):
    state, x, want = expected(config)
    got = compiled(with_gradients(config, layout))(state, x)
    jax.tree.map(close, got, want)


@pytest.mark.parametrize(
    "sizes, activations, algorithm",
    [
        ((2, 1, 4), "tokens", "ring"),
        ((2, 1, 4), "features", "bidirectional"),
        ((1, 2, 4), "tokens", "direct"),
        ((1, 2, 4), "features", None),
        ((1, 1, 8), "tokens", "two_way"),
        ((1, 1, 8), "features", "ring"),
        ((2, 2, 2), "tokens", "bidirectional"),
        ((2, 2, 2), "features", "direct"),
        ((4, 2, 1), "tokens", "ring"),
    ],
)
def test_the_parallel_vit_is_the_same_on_every_mesh(sizes, activations, algorithm):
    check(PARALLEL, layout_of(sizes, activations=activations, algorithm=algorithm))


@pytest.mark.parametrize("sizes, activations", [((2, 1, 4), "features"), ((2, 2, 2), "tokens")])
def test_the_standard_vit_is_the_same_on_every_mesh(sizes, activations):
    check(STANDARD, layout_of(sizes, activations=activations, algorithm="ring"))


@pytest.mark.parametrize("activations", ["tokens", "features"])
def test_the_mean_of_the_tokens(activations):
    config = dataclasses.replace(PARALLEL, pool="gap")
    check(config, layout_of((2, 1, 4), activations=activations, algorithm="ring"))


@pytest.mark.parametrize(
    "image_size, options",
    [
        ((12, 20), {}),  # 15 patches and the class token split over 4
        (16, {"activations": "features"}),
        (16, {"token_dim": 0}),
    ],
)
def test_a_class_token(image_size, options):
    config = dataclasses.replace(PARALLEL, pool="cls", image_size=image_size)
    check(config, layout_of((2, 1, 4), algorithm="ring", **options))


def test_explicit_meshes():
    mesh = make_mesh(2, 2, 2, devices=jax.devices()[:8], axis_types=jax.sharding.AxisType.Explicit)
    layout = Layout(mesh, algorithm="ring")
    with jax.set_mesh(mesh):
        check(PARALLEL, layout)


def test_a_sequence_that_does_not_split_is_refused():
    config = dataclasses.replace(PARALLEL, pool="cls")
    run = apply(config, layout_of((2, 1, 4)))
    with pytest.raises(ValueError, match=r"dimension 1 of \(8, 17, 48\) .*'tensor'=4.* 16 or 20"):
        jax.eval_shape(run, parameters(config), images(config))


def test_a_batch_that_does_not_split_is_refused():
    run = apply(PARALLEL, layout_of((2, 1, 4)))
    with pytest.raises(ValueError, match=r"dimension 0 of \(7, .* devices.* 6 or 8"):
        jax.eval_shape(run, parameters(PARALLEL), images(PARALLEL, batch=7))


# One gather or scatter on a ring of 4 is three permutes; the blocks' jaxpr stands once, in a scan.
# The embedding gathers its kernel. The pooling head gathers for key and value together and for its
# MLP, and scatters twice; the classifier scatters once.
EMBEDDING, HEAD = 3, 3 * 5


@pytest.mark.parametrize("parallel, collectives", [(True, 2), (False, 4)])
def test_a_parallel_block_is_one_gather_and_one_scatter(parallel, collectives):
    config = PARALLEL if parallel else STANDARD
    run = apply(config, layout_of((2, 1, 4), algorithm="ring"))
    found = permutes(named(run, parameters(config), images(config)))
    assert len(found) == EMBEDDING + 3 * collectives + HEAD


# What is left are psums: of gradients over the data axes, of biases over tensor.
MOVES = ("all_gather", "reduce_scatter", "psum_scatter", "all_to_all")


@pytest.mark.parametrize("activations", ["tokens", "features"])
def test_no_plain_collective_moves_activations(activations):
    layout = layout_of((2, 1, 4), activations=activations, algorithm="ring")
    run = with_gradients(PARALLEL, layout)
    found = named(run, parameters(PARALLEL), images(PARALLEL))
    assert permutes(found)
    assert not [name for name in found if name.startswith(MOVES)]


def test_no_compiled_gather_moves_activations():
    """What lies between the collective matmuls is the compiler's: it has nothing to move."""
    layout = layout_of((2, 1, 4), algorithm="ring")
    state = nnx.state(nn.create(lambda: vit.ViT(PARALLEL, layout=layout, rngs=nnx.Rngs(0))))
    x = jax.device_put(images(PARALLEL), jax.NamedSharding(layout.mesh, P(layout.data)))
    text = compiled(with_gradients(PARALLEL, layout)).lower(state, x).compile().as_text()
    assert "collective-permute(" in text
    for name in ("all-gather(", "all-to-all(", "reduce-scatter("):
        assert name not in text


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("remat", ["full", "dots", "products"])
def test_remat_changes_no_gradient(remat, parallel):
    config = PARALLEL if parallel else STANDARD
    state, x, want = expected(config)
    got = compiled(with_gradients(dataclasses.replace(config, remat=remat)))(state, x)
    jax.tree.map(close, got, want)


# "full" repeats the gathers, and in the standard block the first scatter, which the second gather
# needs; nobody asks for the last scatter's sum.
@pytest.mark.parametrize("parallel, repeated", [(True, 1), (False, 3)])
def test_remat_of_products_repeats_no_collective(parallel, repeated):
    config = dataclasses.replace(PARALLEL if parallel else STANDARD, pool="gap")
    layout = layout_of((2, 1, 4), algorithm="ring")
    state, x = parameters(config), images(config)
    sent = {}
    for remat in (None, "products", "full"):
        run = with_gradients(dataclasses.replace(config, remat=remat), layout)
        sent[remat] = len(permutes(named(run, state, x)))
    assert sent["products"] == sent[None]
    assert sent["full"] == sent[None] + 3 * repeated


def test_an_unknown_remat_policy_is_refused():
    config = dataclasses.replace(PARALLEL, remat="some")
    with pytest.raises(ValueError, match="remat='some' is none of"):
        vit.ViT(config, layout=None, rngs=nnx.Rngs(0))


def test_unrolled_layers_are_the_same():
    state, x, want = expected(PARALLEL)
    got = compiled(with_gradients(dataclasses.replace(PARALLEL, unroll=2)))(state, x)
    jax.tree.map(close, got, want)


def test_activations_by_name():
    state, x, (logits, _) = expected(PARALLEL)
    wanted = ("block_1/*", "pool/attention_logits", "encoded", "embedded")
    layout = layout_of((2, 1, 4), algorithm="ring")
    alone, there = (
        compiled(apply(PARALLEL, at, capture=wanted))(state, x) for at in (None, layout)
    )
    close(alone[0], logits)
    jax.tree.map(close, there, alone)
    found = alone[1]
    assert found.keys() == {
        "encoded", "embedded", "pool/attention_logits",
        *(f"block_1/{name}" for name in ("query", "key", "value", "attention_logits",
                                         "attention_logit_max", "attention_entropy",
                                         "attention_output", "mlp_hidden", "output")),
    }  # fmt: skip
    assert found["block_1/attention_logits"].shape == (8, 8, 16, 16)
    assert found["block_1/attention_entropy"].shape == (8, 8), "of each row and head"
    scores = np.einsum("bqhd,bkhd->bhqk", found["block_1/query"], found["block_1/key"]) / 4**0.5
    close(found["block_1/attention_logits"], scores)


def test_a_wrong_name_is_refused_with_the_right_ones():
    state, x = parameters(PARALLEL), images(PARALLEL)
    with pytest.raises(ValueError, match=r"no activation is called 'block_2/\*'.*block_1/query"):
        jax.eval_shape(apply(PARALLEL, capture=("block_2/*",)), state, x)
    with pytest.raises(ValueError, match=r"'blok_1/query'.*'logits'"):
        jax.eval_shape(apply(PARALLEL, capture="blok_1/query"), state, x)


def test_without_a_classifier_the_features_come_out():
    config = dataclasses.replace(PARALLEL, num_classes=None)
    state, x = parameters(config), images(config)
    features, found = compiled(apply(config, capture=("pooled",)))(state, x)
    assert features.shape == (8, 32)
    close(features, found["pooled"], 0)


def test_a_new_model_says_its_bias():
    config = dataclasses.replace(PARALLEL, head_bias=-10.0)
    model = nn.create(lambda: vit.ViT(config, layout=None, rngs=nnx.Rngs(0)))
    close(compiled(model)(images(config)), np.full((8, 10), -10.0), 0)


def test_bfloat16_computes_norms_and_softmax_in_float32():
    config = dataclasses.replace(PARALLEL, dtype="bfloat16")
    layout = layout_of((2, 1, 4), algorithm="ring")
    state, x, (want, _) = expected(PARALLEL)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    for at in (None, layout):
        logits, found = compiled(apply(config, at, capture=("*",)))(state, x)
        assert logits.dtype == jnp.float32
        assert found["block_0/output"].dtype == jnp.bfloat16
        assert found["block_0/attention_logits"].dtype == jnp.float32
        np.testing.assert_allclose(logits, want, atol=0.05 * float(jnp.abs(want).max()))


def test_patches_make_the_embedding_a_convolution():
    state, x = parameters(PARALLEL), images(PARALLEL)
    _, found = compiled(apply(PARALLEL, capture=("embedded",)))(state, x)
    kernel = state["embedding"]["kernel"][...].reshape(4, 4, 3, 32)
    convolved = jax.lax.conv_general_dilated(
        x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    want = convolved.reshape(8, 16, 32) + state["embedding"]["bias"][...].reshape(1, 1, 32)
    close(found["embedded"], want + state["position"][...])


@pytest.mark.parametrize("new", [(4, 8), (7, 5), (3, 3)])
def test_positions_are_resampled_as_scipy_zooms(new):
    old = (4, 4)
    table = np.random.default_rng(0).normal(size=(*old, 6)).astype(np.float32)
    want = scipy.ndimage.zoom(table, (new[0] / old[0], new[1] / old[1], 1), order=1)
    got = resample(jnp.asarray(table).reshape(1, 16, 6), old, new)
    close(got, want.reshape(1, -1, 6), 1e-6)


@pytest.mark.parametrize("pool", ["map", "cls"])
def test_other_resolutions(pool):
    config = dataclasses.replace(PARALLEL, pool=pool)
    state = parameters(config)
    small, large = (images(config, batch=1, seed=seed) for seed in (1, 2))
    large = jax.image.resize(large, (1, 24, 32, 3), "linear")
    assert compiled(apply(config))(state, large).shape == (1, 10)
    with pytest.raises(ValueError, match="15 x 16 pixels does not split into patches of 4 x 4"):
        apply(config)(state, small[:, :15])


def test_norms_are_those_of_flax():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (4, 6, 8))
    scale, bias = jax.random.normal(jax.random.key(1), (2, 8))
    ours = Norm("ln", 8, use_bias=True, epsilon=1e-6)
    theirs = nnx.LayerNorm(8, epsilon=1e-6, use_fast_variance=False, rngs=nnx.Rngs(0))
    for module in (ours, theirs):
        module.scale[...], module.bias[...] = scale, bias
    close(ours(x), theirs(x))
    ours = Norm("rms", 8, use_bias=False, epsilon=1e-6)
    theirs = nnx.RMSNorm(8, epsilon=1e-6, rngs=nnx.Rngs(0))
    for module in (ours, theirs):
        module.scale[...] = scale
    close(ours(x), theirs(x))
    with pytest.raises(ValueError, match="'layer' is neither"):
        Norm("layer", 8, use_bias=True, epsilon=1e-6)


def test_attention_is_that_of_flax():
    """linen's own, which normalises queries and keys with centring."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 32))
    theirs = linen.MultiHeadDotProductAttention(8, normalize_qk=True, use_bias=True)
    params = theirs.init(jax.random.key(1), x)["params"]
    keys = iter(jax.random.split(jax.random.key(2), 16))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)
    style = dataclasses.replace(vit.STANDARD, qk_norm="ln")
    ours = Attention(STANDARD, style, layout=None, query_layout=None, rngs=nnx.Rngs(0))
    renamed = {"query_ln": "query_norm", "key_ln": "key_norm"}
    nnx.update(ours, {renamed.get(name, name): value for name, value in params.items()})
    close(ours(x, Capture(lambda name: False)), theirs.apply({"params": params}, x))


def test_parameters_lie_where_the_layout_wants_them():
    layout = layout_of((2, 2, 2))
    model = nnx.eval_shape(lambda: vit.ViT(PARALLEL, layout=layout, rngs=nnx.Rngs(0)))
    specs = nnx.to_pure_dict(nn.partition_specs(model))
    blocks = specs["encoder"]["blocks"]
    assert blocks["attention"]["query"]["kernel"] == P(None, "fsdp", "tensor", None)
    assert blocks["attention"]["out"]["kernel"] == P(None, "tensor", None, "fsdp")
    assert blocks["norm"]["scale"] == specs["position"] == P()
    assert specs["embedding"]["kernel"] == P(None, ("fsdp", "tensor"))
    assert specs["head"]["kernel"] == P("tensor", None)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 5}, "width=32 does not split into heads=5"),
        ({"patch_size": 5}, "16 x 16 pixels does not split into patches of 5 x 5"),
        ({"pool": "mean"}, "pool='mean' is none of"),
        ({"activation": "relu"}, "activation='relu' is none of"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PARALLEL, **changes)


@pytest.mark.parametrize("name", ["XL/16", "B", "B/x", "b/16"])
def test_an_unknown_variant_is_refused(name):
    with pytest.raises(ValueError, match=f"no variant '{name}'"):
        vit.variant(name)


def test_variants():
    assert vit.variant("22B/14").parallel
    assert vit.variant("22B/14").head_dim == 128
    assert vit.variant("B/16", image_size=384).grid == (24, 24)
    assert vit.variant("22B/14", style=vit.STANDARD).style == vit.STANDARD

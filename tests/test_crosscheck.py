"""Our vision transformers against those of timm and transformers: outputs and all gradients.

Weights are random, theirs are copied into ours, and both sides compute in float32 on one device.
`theirs` below is always the arrays of the other model by name. Copying is linear, so the function
that copies the parameters also copies their gradients. An array of ours has the order of theirs
after `dense` and `embedding`; its shape, which may split a dimension into heads, comes from our
model.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import vit
from models.weights import names

from .helpers import quick

SIZES = {"width": 64, "depth": 2, "mlp_dim": 128, "heads": 4, "patch_size": 8, "dtype": "float32"}
WIDTH, MLP_DIM = SIZES["width"], SIZES["mlp_dim"]
QKV = ("query", "key", "value")
EPSILON = 1e-3  # so large that float32 sees where a norm adds it


def dense(name, weight, bias=None):
    """A linear layer: torch has [out, in], flax [in, out]."""
    return {f"{name}.kernel": weight.T} | ({} if bias is None else {f"{name}.bias": bias})


def copied(theirs, **layers):
    """Layers that have both a weight and a bias, by our name with `__` for a full stop."""
    found = {}
    for name, other in layers.items():
        name = name.replace("__", ".")
        if f"{other}.in_proj_weight" in theirs:  # three layers in one
            weights = np.split(theirs[f"{other}.in_proj_weight"], 3)
            biases = np.split(theirs[f"{other}.in_proj_bias"], 3)
            for part, weight, bias in zip(QKV, weights, biases, strict=True):
                found |= dense(f"{name}.{part}", weight, bias)
        else:
            found |= dense(name, theirs[f"{other}.weight"], theirs[f"{other}.bias"])
    return found


def norm(name, theirs, other):
    """A scale, and a bias if theirs has one."""
    found = {f"{name}.scale": theirs[f"{other}.weight"]}
    bias = theirs.get(f"{other}.bias")
    return found if bias is None else found | {f"{name}.bias": bias}


def embedding(theirs, other):
    """A convolution: torch has [out, channels, height, width], ours [height, width, channels]."""
    kernel = theirs[f"{other}.weight"].transpose(2, 3, 1, 0)
    return {"embedding.kernel": kernel, "embedding.bias": theirs[f"{other}.bias"]}


def stacked(block):
    """The parameters of all layers, from `block(layer)`."""
    layers = [block(i) for i in range(SIZES["depth"])]
    return {
        f"encoder.blocks.{name}": np.stack([layer[name] for layer in layers]) for name in layers[0]
    }


def from_timm(theirs):
    """Of a `VisionTransformer` of `ParallelScalingBlock`s and attention pooling."""

    def block(i):
        own = functools.partial("blocks.{}.{}".format, i)
        cuts = np.cumsum([MLP_DIM, WIDTH, WIDTH])
        up, *qkv = np.split(theirs[own("in_proj.weight")], cuts)
        found = dense("mlp.up", up, theirs[own("mlp_bias")])
        for part, weight in zip(QKV, qkv, strict=True):
            found |= dense(f"attention.{part}", weight)
        if own("out_proj.weight") in theirs:  # one bias for the sum of both
            out, down = np.split(theirs[own("out_proj.weight")], [WIDTH], axis=1)
            found |= dense("attention.out", out)
            found |= dense("mlp.down", down, theirs[own("out_proj.bias")])
        else:
            layers = {"attention__out": own("attn_out_proj"), "mlp__down": own("mlp_out_proj")}
            found |= copied(theirs, **layers)
        found |= norm("norm", theirs, own("in_norm"))
        found |= norm("attention.query_norm", theirs, own("q_norm"))
        return found | norm("attention.key_norm", theirs, own("k_norm"))

    key, value = np.split(theirs["attn_pool.kv.weight"], 2)
    key_bias, value_bias = np.split(theirs["attn_pool.kv.bias"], 2)
    return (
        embedding(theirs, "patch_embed.proj")
        | {"position": theirs["pos_embed"], "pool.probe": theirs["attn_pool.latent"]}
        | stacked(block)
        | norm("encoder.norm", theirs, "norm")
        | dense("pool.attention.key", key, key_bias)
        | dense("pool.attention.value", value, value_bias)
        | norm("pool.norm", theirs, "attn_pool.norm")
        | copied(
            theirs,
            pool__attention__query="attn_pool.q",
            pool__attention__out="attn_pool.proj",
            pool__mlp__up="attn_pool.mlp.fc1",
            pool__mlp__down="attn_pool.mlp.fc2",
            head="head",
        )
    )


def standard_block(theirs, own, attention, out, norms):
    """One block of transformers; its models differ in names alone."""
    found = copied(
        theirs,
        attention__query=own(f"{attention}.q_proj"),
        attention__key=own(f"{attention}.k_proj"),
        attention__value=own(f"{attention}.v_proj"),
        attention__out=own(f"{attention}.{out}"),
        mlp__up=own("mlp.fc1"),
        mlp__down=own("mlp.fc2"),
    )
    found |= norm("attention_norm", theirs, own(norms[0]))
    return found | norm("mlp_norm", theirs, own(norms[1]))


def from_siglip(theirs):
    """Of a `SiglipVisionModel`."""

    def block(i):
        own = functools.partial("encoder.layers.{}.{}".format, i)
        norms = ("layer_norm1", "layer_norm2")
        return standard_block(theirs, own, "self_attn", "out_proj", norms)

    return (
        embedding(theirs, "embeddings.patch_embedding")
        | {"position": theirs["embeddings.position_embedding.weight"]}
        | {"pool.probe": theirs["head.probe"]}
        | stacked(block)
        | norm("encoder.norm", theirs, "post_layernorm")
        | norm("pool.norm", theirs, "head.layernorm")
        | copied(
            theirs,
            pool__attention="head.attention",
            pool__attention__out="head.attention.out_proj",
            pool__mlp__up="head.mlp.fc1",
            pool__mlp__down="head.mlp.fc2",
        )
    )


def from_vit(theirs):
    """Of a `ViTModel`."""

    def block(i):
        own = functools.partial("layers.{}.{}".format, i)
        norms = ("layernorm_before", "layernorm_after")
        return standard_block(theirs, own, "attention", "o_proj", norms)

    return (
        embedding(theirs, "embeddings.patch_embeddings.projection")
        | {"cls": theirs["embeddings.cls_token"]}
        | {"position": theirs["embeddings.position_embeddings"]}
        | stacked(block)
        | norm("encoder.norm", theirs, "layernorm")
    )


def run_theirs(model, output, images, cotangent):
    """Makes all parameters random: many are zeros or ones at first, which hides what they do.

    Returns:
      The parameters, the output, the images' gradient, and the parameters' gradients.
    """
    import torch

    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = np.float32(1.0 if parameter.ndim == 1 else 0.1)
            values = scale * rng.standard_normal(parameter.shape, dtype=np.float32)
            parameter.copy_(torch.from_numpy(values))
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
    y = output(model.eval()(x))
    y.backward(torch.from_numpy(cotangent))
    parameters = {name: p.detach().numpy() for name, p in model.named_parameters()}
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return parameters, y.detach().numpy(), x.grad.numpy().transpose(0, 2, 3, 1), gradients


def run_ours(config, parameters, images, cotangent):
    """The output, the images' gradient, and by name the parameters' gradients."""
    abstract = nnx.eval_shape(lambda: vit.ViT(config, layout=None, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    leaves, tree = jax.tree.flatten(state)
    ordered = names(nnx.to_pure_dict(state))
    assert set(ordered) == set(parameters)
    given = [
        jnp.asarray(parameters[name].reshape(leaf.shape))
        for name, leaf in zip(ordered, leaves, strict=True)
    ]

    @functools.partial(jax.jit, compiler_options=quick())
    def run(given, images):
        def model(given, images):
            return nnx.merge(graph, jax.tree.unflatten(tree, given))(images)

        y, backward = jax.vjp(model, given, images)
        return y, *backward(jnp.asarray(cotangent))

    y, gradients, of_images = run(given, jnp.asarray(images))
    return y, of_images, dict(zip(ordered, gradients, strict=True))


def check(config, model, copy, output=lambda y: y):
    """Compares `model`, whose parameters `copy` brings into our order, with ours."""
    rng = np.random.default_rng(1)
    shape = (2, *config.image_shape, config.channels)
    images = rng.standard_normal(shape, dtype=np.float32)
    features = config.num_classes or config.width
    cotangent = rng.standard_normal((shape[0], features), dtype=np.float32)
    parameters, want, want_images, gradients = run_theirs(model, output, images, cotangent)
    copies, wanted = copy(parameters), copy(gradients)
    assert sum(x.size for x in copies.values()) == sum(x.size for x in parameters.values())
    got, got_images, got_gradients = run_ours(config, copies, images, cotangent)
    # What differs is the order of sums. The gradient of the keys' bias is zero but for rounding:
    # softmax does not see it.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got_images, want_images, rtol=1e-4, atol=1e-6)
    for name, gradient in got_gradients.items():
        same = wanted[name].reshape(gradient.shape)
        np.testing.assert_allclose(gradient, same, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("kind", ["rms", "ln"])
def test_the_parallel_vit_is_that_of_timm(timm, kind, fused):
    """The whole graph of ViT-22B: QK norm, no biases in norms and query, key, value, pooling."""
    import torch

    theirs = timm.models.vision_transformer
    norms = {
        "rms": functools.partial(timm.layers.RmsNorm, eps=EPSILON),
        "ln": functools.partial(torch.nn.LayerNorm, eps=EPSILON, bias=False),
    }
    config = vit.Config(
        **SIZES,
        image_size=(32, 48),
        num_classes=10,
        parallel=True,
        style=vit.Style(
            norm=kind, norm_bias=False, qk_norm=kind, qkv_bias=False, out_bias=not fused
        ),
        head_style=vit.Style(norm=kind, norm_bias=False),
        activation="gelu",
        epsilon=EPSILON,
    )
    model = theirs.VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=config.num_classes,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_dim / config.width,
        block_fn=functools.partial(theirs.ParallelScalingBlock, fuse_out_proj=fused),
        qk_norm=True,
        qkv_bias=False,
        class_token=False,
        global_pool="map",
        norm_layer=norms[kind],
        act_layer=torch.nn.GELU,
    )
    check(config, model, from_timm)


def hub_sizes(config):
    """The sizes, as transformers calls them."""
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.heads,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "layer_norm_eps": config.epsilon,
    }


def test_the_standard_vit_is_siglips():
    """Attention pooling and the approximate GELU."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = vit.Config(**SIZES, image_size=32, num_classes=None, epsilon=EPSILON)
    model = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**hub_sizes(config), hidden_act="gelu_pytorch_tanh")
    )
    check(config, model, from_siglip, lambda y: y.pooler_output)


def test_the_standard_vit_with_a_class_token_is_that_of_transformers():
    """The exact GELU, and the epsilon that is usual there."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = vit.Config(
        **SIZES, image_size=(32, 48), num_classes=None, pool="cls", activation="gelu", epsilon=1e-12
    )
    model = transformers.ViTModel(
        transformers.ViTConfig(**hub_sizes(config), hidden_act="gelu"), add_pooling_layer=False
    )
    check(config, model, from_vit, lambda y: y.last_hidden_state[:, 0])

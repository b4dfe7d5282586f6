"""Our vision transformers against those of timm and transformers: outputs, gradients and files.

Weights are random, and both sides compute in float32 on one device. Weights travel in files alone:
those of the others are written by their own functions and read by `models.formats`, ours are
written by `models.formats` and read by their own loaders, which have to find every array. Their
gradients are brought into our order the same way, as the weights of a model.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import formats, vit
from models.arrays.tree import names

from .helpers import quick

SIZES = {"width": 64, "depth": 2, "mlp_dim": 128, "heads": 4, "patch_size": 8, "dtype": "float32"}
EPSILON = 1e-3  # so large that float32 sees where a norm adds it


class Timm:
    """A model of timm: `make()` gives a new one."""

    format = "timm"

    def __init__(self, timm, config, **options):
        self.library = timm
        self.make = lambda: timm.models.vision_transformer.VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            num_classes=config.num_classes or 0,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_dim / config.width,
            class_token=config.pool == "cls",
            **options,
        )

    def write(self, model, folder):
        import safetensors.torch

        folder.mkdir()
        safetensors.torch.save_model(model, folder / "model.safetensors")

    def read(self, path):
        model = self.make()
        self.library.models.load_checkpoint(model, str(path), strict=True)
        return model

    def output(self, y):
        return y


class Transformers:
    """A model of transformers, of a class and its config; `output` takes what we compute too."""

    def __init__(self, kind, config, output, name, **options):
        self.kind, self.output, self.format, self.options = kind, output, name, options
        self.make = lambda: kind(config, **options)

    def write(self, model, folder):
        model.save_pretrained(folder)

    def read(self, path):
        model, info = self.kind.from_pretrained(
            path.parent, output_loading_info=True, **self.options
        )
        assert not any(info.values()), info
        return model


def outcome(theirs, model, images, cotangent=None):
    """The output of a model; given its cotangent, also the gradient of the images."""
    import torch

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
    y = theirs.output(model.eval()(x))
    if cotangent is None:
        return y.detach().numpy()
    y.backward(torch.from_numpy(cotangent))
    return y.detach().numpy(), x.grad.numpy().transpose(0, 2, 3, 1)


def randomise(model):
    """Makes all parameters random: many are zeros or ones at first, which hides what they do."""
    import torch

    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = np.float32(1.0 if parameter.ndim == 1 else 0.1)
            values = scale * rng.standard_normal(parameter.shape, dtype=np.float32)
            parameter.copy_(torch.from_numpy(values))


def graph_of(config):
    return nnx.graphdef(nnx.eval_shape(lambda: vit.ViT(config, layout=None, rngs=nnx.Rngs(0))))


def run_ours(config, params, images, cotangent):
    """The output, and the gradients of parameters and images."""
    graph = graph_of(config)

    @functools.partial(jax.jit, compiler_options=quick())
    def run(params, images):
        y, backward = jax.vjp(lambda p, x: nnx.merge(graph, p)(x), params, images)
        return y, *backward(jnp.asarray(cotangent))

    return run(params, jnp.asarray(images))


def check_gradients(theirs, config, tmp_path):
    """Both directions of a file, the outputs, and all gradients."""
    import torch

    rng = np.random.default_rng(1)
    shape = (2, *config.image_shape, config.channels)
    images = rng.standard_normal(shape, dtype=np.float32)
    cotangent = rng.standard_normal((2, config.num_classes or config.width), dtype=np.float32)
    model = theirs.make()
    randomise(model)
    theirs.write(model, tmp_path / "theirs")
    params = formats.load(tmp_path / "theirs", config)
    assert formats.sniff(tmp_path / "theirs") == theirs.format

    want, want_images = outcome(theirs, model, images, cotangent)
    got, gradients, got_images = run_ours(config, params, images, cotangent)
    # What differs is the order of sums. The gradient of the keys' bias is zero but for rounding:
    # softmax does not see it.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got_images, want_images, rtol=1e-4, atol=1e-6)

    formats.save(params, config, tmp_path / "ours" / "model.safetensors", theirs.format)
    back = theirs.read(tmp_path / "ours" / "model.safetensors")
    np.testing.assert_array_equal(outcome(theirs, back, images), want)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    theirs.write(model, tmp_path / "gradients")
    wanted = formats.load(tmp_path / "gradients", config)
    for name, x, y in zip(
        names(gradients), jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)


def check_output(theirs, config, tmp_path):
    """Both directions of a file, and the outputs."""
    shape = (2, *config.image_shape, config.channels)
    images = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    model = theirs.make()
    randomise(model)
    theirs.write(model, tmp_path / "theirs")
    params = formats.load(tmp_path / "theirs", config)
    want = outcome(theirs, model, images)
    graph = graph_of(config)
    run = jax.jit(lambda p, x: nnx.merge(graph, p)(x), compiler_options=quick())
    np.testing.assert_allclose(run(params, jnp.asarray(images)), want, rtol=1e-5, atol=1e-5)
    formats.save(params, config, tmp_path / "ours" / "model.safetensors", theirs.format)
    back = theirs.read(tmp_path / "ours" / "model.safetensors")
    np.testing.assert_array_equal(outcome(theirs, back, images), want)
    return params, images, want


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("kind", ["rms", "ln"])
def test_the_parallel_vit_is_that_of_timm(timm, kind, fused, tmp_path):
    """The whole graph of ViT-22B: QK norm, no biases in norms and query, key, value, pooling."""
    import torch

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
    block = timm.models.vision_transformer.ParallelScalingBlock
    theirs = Timm(
        timm,
        config,
        block_fn=functools.partial(block, fuse_out_proj=fused),
        qk_norm=True,
        qkv_bias=False,
        global_pool="map",
        norm_layer=norms[kind],
        act_layer=torch.nn.GELU,
    )
    check_gradients(theirs, config, tmp_path)


@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_the_standard_vit_is_that_of_timm(timm, pool, tmp_path):
    """The one that most of timm's weights are of; its mean is of normed tokens as ours."""
    config = vit.Config(
        **SIZES, image_size=32, num_classes=10, pool=pool, activation="gelu", epsilon=1e-6
    )
    options = {"global_pool": "token"} if pool == "cls" else {"global_pool": "avg"}
    check_output(Timm(timm, config, fc_norm=False, **options), config, tmp_path)


@pytest.mark.parametrize("pool", ["cls", "map"])
def test_timm_reads_our_npz_as_big_visions(timm, pool, tmp_path):
    """timm has a reader of big_vision's files of its own."""
    config = vit.Config(
        **SIZES, image_size=32, num_classes=10, pool=pool, activation="gelu_tanh", epsilon=1e-6
    )
    options = {"global_pool": {"cls": "token", "map": "map"}[pool], "act_layer": "gelu_tanh"}
    theirs = Timm(timm, config, **options)
    params, images, want = check_output(theirs, config, tmp_path)
    formats.save(params, config, tmp_path / "model.npz", "bigvision")
    back = theirs.read(tmp_path / "model.npz")
    np.testing.assert_array_equal(outcome(theirs, back, images), want)


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


@pytest.fixture(scope="module")
def transformers(timm):
    """The module, which imports torchvision too: `timm` has made that possible."""
    module = pytest.importorskip("transformers")
    module.utils.logging.disable_progress_bar()
    return module


SIGLIP = vit.Config(**SIZES, image_size=32, num_classes=None, epsilon=EPSILON)


def test_the_standard_vit_is_siglips(transformers, tmp_path):
    """Attention pooling and the approximate GELU."""
    sizes = transformers.SiglipVisionConfig(**hub_sizes(SIGLIP), hidden_act="gelu_pytorch_tanh")
    theirs = Transformers(
        transformers.SiglipVisionModel, sizes, lambda y: y.pooler_output, "siglip"
    )
    check_gradients(theirs, SIGLIP, tmp_path)
    assert formats.config_of(tmp_path / "theirs", dtype="float32") == SIGLIP
    assert formats.config_of(tmp_path / "ours", dtype="float32") == SIGLIP


def test_the_tower_of_a_whole_siglip(transformers, tmp_path):
    """The text tower is passed over, and the classifier takes the mean of the tokens."""
    vision = {**hub_sizes(SIGLIP), "hidden_act": "gelu_pytorch_tanh"}
    text = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 32,
            "num_attention_heads": 4, "vocab_size": 9, "bos_token_id": 1,
            "eos_token_id": 2, "projection_size": 64}  # fmt: skip
    whole = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text, vision_config=vision)
    )
    randomise(whole)
    whole.save_pretrained(tmp_path / "whole")
    tower = Transformers(transformers.SiglipVisionModel, None, None, "siglip")
    tower.write(whole.vision_model, tmp_path / "tower")
    got, want = (formats.load(tmp_path / folder, SIGLIP) for folder in ("whole", "tower"))
    jax.tree.map(np.testing.assert_array_equal, got, want)

    config = vit.Config(**SIZES, image_size=32, num_classes=10, pool="gap", epsilon=EPSILON)
    sizes = transformers.SiglipConfig(
        text_config=text, vision_config=vision | {"vision_use_head": False}, num_labels=10
    )
    kind = transformers.SiglipForImageClassification
    check_output(
        Transformers(kind, sizes, lambda y: y.logits, "siglip"), config, tmp_path / "classifier"
    )


@pytest.mark.parametrize("classes", [None, 10])
def test_the_standard_vit_with_a_class_token_is_that_of_transformers(
    transformers, classes, tmp_path
):
    """The exact GELU, and the epsilon that is usual there."""
    config = vit.Config(
        **SIZES,
        image_size=(32, 48),
        num_classes=classes,
        pool="cls",
        activation="gelu",
        epsilon=1e-12,
    )
    labels = {} if classes is None else {"num_labels": classes}
    sizes = transformers.ViTConfig(**hub_sizes(config), hidden_act="gelu", **labels)
    if classes is None:
        kind, output = transformers.ViTModel, lambda y: y.last_hidden_state[:, 0]
        theirs = Transformers(kind, sizes, output, "transformers_vit", add_pooling_layer=False)
        check_gradients(theirs, config, tmp_path)
    else:
        kind = transformers.ViTForImageClassification
        check_output(
            Transformers(kind, sizes, lambda y: y.logits, "transformers_vit"), config, tmp_path
        )
    assert formats.config_of(tmp_path / "theirs", dtype="float32") == config
    assert formats.config_of(tmp_path / "ours", dtype="float32") == config

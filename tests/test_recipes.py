"""The experiments of models/configs: what they state is so, and they do what they are for."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.predicted.programs import trained_work
from models import configs, devices, formats, params, step
from models.data import splits
from models.position import resample
from models.start import Start

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
PUBLISHED = {  # millions of parameters of the encoder, or of its products for 22B
    "s16": ("encoder", 22),
    "b16": ("encoder", 86),
    "l16": ("encoder", 303),
    "g14": ("encoder", 1011),
    "gg14": ("encoder", 1843),
    "e14": ("with_head", 3926),
    "vit_22b": ("matmul", 21743),
}


@pytest.mark.parametrize("name", configs.names())
def test_an_experiment_says_where_it_is_from_how_to_run_it_and_what_it_costs(name):
    text = (ROOT / "models" / "configs" / f"{name}.py").read_text(encoding="utf-8")
    doc = text.split('"""')[1]
    assert f"python -m models.train {name}" in doc
    assert "Expected:" in doc
    assert re.search(r"arXiv|Source:|\| from \||public recipe|`vit_22b_384`", doc)
    config = configs.load(name)
    (cost,) = re.findall(r"^Cost: (\S+) FLOPs of the model \(predicted", doc, re.MULTILINE)
    work = trained_work(config.model, config.batch).flops * config.steps
    assert float(cost) == pytest.approx(work, rel=0.01)


@pytest.mark.parametrize("name", configs.names())
def test_an_experiments_sizes_split_over_its_mesh(name):
    config = configs.load(name)
    data, fsdp, tensor = config.mesh
    rows = config.batch // config.optim.accumulate
    assert config.batch % config.optim.accumulate == 0 and rows % (data * fsdp * tensor) == 0
    assert config.model.heads % tensor == 0 and config.model.mlp_dim % tensor == 0
    cut = config.model.grid[0] * config.model.grid[1] if config.layout == "tokens" else 0
    assert cut % tensor == 0


def test_the_page_lists_every_experiment():
    """With its steps and its batch."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in configs.names():
        config = configs.load(name)
        (row,) = [
            line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line
        ]
        assert f"| {config.steps:,} x {config.batch:,} |" in row


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_models_are_the_published_ones(name):
    convention, millions = PUBLISHED[name]
    assert round(params.count(configs.load(name).model, convention) / 1e6) == millions


def test_the_recipe_of_vit_22b():
    """Of google-research/vmoe `get_optimizer_rsqrt_config`, and the steps of the paper's notes."""
    config = configs.load("vit_22b")
    optim = config.optim
    assert (optim.lr, optim.warmup, optim.timescale) == (1e-3, 10_000, 10_000)
    assert (optim.cooldown, optim.b1, optim.b2, optim.clip) == (50_000, 0.9, 0.999, 1.0)
    assert (optim.decay_head, optim.decay_body, optim.name) == (3.0, 0.03, "adam")
    assert (config.steps, config.batch, config.loss) == (177_000, 65_536, "sigmoid")
    assert (config.model.num_classes, config.model.head_bias) == (29_593, -10.0)
    assert (config.model.parallel, config.model.style.qk_norm) == (True, "rms")
    assert config.steps * config.batch / 4e9 == pytest.approx(2.9, abs=0.01), "epochs"


def test_the_classifiers_biases_begin_where_the_config_says():
    config = dataclasses.replace(configs.load("g14"), mesh=(1, 1, 1), batch=1)
    tiny = dataclasses.replace(
        config.model, width=16, depth=1, mlp_dim=16, heads=2, num_classes=7, image_size=28
    )
    _, state = step.create(dataclasses.replace(config, model=tiny), None)
    np.testing.assert_array_equal(state.params["head"]["bias"], np.full(7, -10.0, np.float32))
    np.testing.assert_array_equal(state.params["head"]["kernel"], 0.0)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A small model of 32 x 32 pixels, its config, and its parameters in a file."""
    config = configs.load("mu")
    tiny = dataclasses.replace(config.model, width=16, depth=1, mlp_dim=32)
    config = dataclasses.replace(config, model=tiny, batch=8)
    _, state = step.create(config, None)
    head = {"kernel": jnp.ones((16, 10)), "bias": jnp.ones(10)}
    state = dataclasses.replace(state, params=state.params | {"head": head})
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    formats.save(state.params, config.model, path)
    return config, state.params, path


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 4)])
def test_fine_tuning_begins_with_resampled_positions_and_a_new_classifier(pretrained, mesh):
    """From a grid of 4 x 4 to one of 8 x 8, and with another number of classes."""
    config, before, path = pretrained
    larger = dataclasses.replace(config.model, image_size=64, num_classes=5)
    config = dataclasses.replace(config, model=larger, start=Start(path), mesh=mesh)
    layout = devices.layout_of(config)
    _, state = step.create(config, layout)
    found = jax.device_get(state.params)
    wanted = resample(before["position"], (4, 4), (8, 8))
    np.testing.assert_allclose(found["position"], wanted, rtol=1e-6, atol=1e-6)
    assert found["position"].shape == (1, 64, 16)
    np.testing.assert_array_equal(found["head"]["kernel"], np.zeros((16, 5)))
    for name in ("embedding", "encoder", "pool"):
        jax.tree.map(np.testing.assert_array_equal, found[name], jax.device_get(before[name]))
    if layout is not None:
        kernel = state.params["encoder"]["blocks"]["mlp"]["up"]["kernel"]
        assert {piece.data.shape for piece in kernel.addressable_shards} == {(1, 8, 8)}


def test_the_classifier_comes_along_if_asked(pretrained):
    config, before, path = pretrained
    config = dataclasses.replace(config, start=Start(path, head=True))
    _, state = step.create(config, None)
    jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_weights_that_are_not_there_are_named(pretrained):
    config = dataclasses.replace(pretrained[0], start=Start(pathlib.Path("nowhere.safetensors")))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        step.create(config, None)


def test_mu_needs_nothing_but_itself():
    """No mesh, and no file: its images are drawn."""
    config = configs.load("mu")
    assert config.devices == 1 and config.data.path is None
    train, test = splits(
        config.data, image_shape=config.model.image_shape, channels=3, classes=10, seed=0
    )
    assert (len(train), len(test)) == (4096, 512)

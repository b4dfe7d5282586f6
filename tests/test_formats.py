"""Weights in and out, without the libraries that the formats are of: see test_crosscheck for those.

Every format gives back the bits that it was given, whole and cut over a mesh, and says what is
wrong with a file and what to do about it.
"""

import dataclasses
import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding

from collective_matmul import Layout, make_mesh
from models import formats, vit
from models.arrays.tree import abstract, names
from models.position import resample

pytestmark = pytest.mark.slow

TINY = vit.Config(width=32, depth=2, mlp_dim=64, heads=4, patch_size=4, image_size=16,
                  num_classes=10, dtype="float32")  # fmt: skip
VIT_22B = {"parallel": True, "style": vit.VIT_22B}
NO_OUT_BIAS = {"parallel": True, "style": dataclasses.replace(vit.VIT_22B, out_bias=False)}
NO_QKV_BIAS = {"pool": "cls", "style": vit.Style(qkv_bias=False)}
CASES = {
    "ours": [{}, {"pool": "cls"}, {"pool": "gap"}, VIT_22B, {"image_size": (8, 16)}],
    "bigvision": [{}, {"pool": "cls"}, {"pool": "gap"}, {"num_classes": None}],
    "siglip": [{"num_classes": None}, {"pool": "gap"}, {"pool": "gap", "num_classes": None}],
    "timm": [{}, {"pool": "cls"}, {"pool": "gap"}, VIT_22B, NO_OUT_BIAS, NO_QKV_BIAS,
             {"parallel": True}],
    "transformers_vit": [{"pool": "cls"}, {"pool": "cls", "num_classes": None}, NO_QKV_BIAS],
}  # fmt: skip
ALL = [
    pytest.param(name, changes, id=f"{name}-{number}")
    for name, cases in CASES.items()
    for number, changes in enumerate(cases)
]


def config_of(changes):
    return dataclasses.replace(TINY, **changes)


described = functools.cache(lambda config: abstract(config, None))


def random(config):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), described(config))


def assert_same(got, want):
    assert names(got) == names(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def saved(tmp_path, config, kind="ours"):
    """A file and the parameters in it."""
    params = random(config)
    formats.save(params, config, tmp_path / "model", kind)
    (path,) = (tmp_path / "model").glob("model.*")
    return path, params


def changed(path, change):
    """Rewrites the arrays of a file."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            np.savez(path, **change(dict(file)))
    else:
        arrays = change(safetensors.numpy.load_file(path))
        safetensors.numpy.save_file(arrays, path)
    return path


def test_every_format_has_cases():
    assert set(CASES) == set(formats.names())


@pytest.mark.parametrize("kind, changes", ALL)
def test_what_is_saved_is_what_is_loaded(kind, changes, tmp_path):
    config = config_of(changes)
    path, params = saved(tmp_path, config, kind)
    assert formats.sniff(path) == formats.sniff(path.parent) == kind
    loaded = formats.load(path, config)
    assert_same(loaded, params)
    assert all(isinstance(x, np.ndarray) and x.flags.writeable for x in jax.tree.leaves(loaded))


@pytest.mark.parametrize("kind, changes", ALL)
def test_the_config_comes_with_the_file(kind, changes, tmp_path):
    """Heads and activation are not in the shapes of torch; timm has no place for them."""
    config = config_of(changes)
    path, _ = saved(tmp_path, config, kind)
    given = {"dtype": "float32"}
    if kind == "timm":
        given |= {"activation": "gelu_tanh"}
        given |= {} if config.style.qk_norm else {"heads": 4}
    found = formats.config_of(path, **given)
    assert found == config


def test_what_a_file_does_not_show_has_to_be_given(tmp_path):
    path, _ = saved(tmp_path, TINY, "timm")
    with pytest.raises(ValueError, match=r"does not show heads; give it: config_of\(path, heads="):
        formats.config_of(path)
    with pytest.raises(ValueError, match=r"vit\.Config has no field 'head'"):
        formats.config_of(path, head=4)


@pytest.mark.parametrize("activations", ["tokens", "features"])
@pytest.mark.parametrize("kind", ["ours", "bigvision", "timm"])
def test_a_mesh_is_filled_shard_by_shard(kind, activations, tmp_path):
    path, params = saved(tmp_path, TINY, kind)
    mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8])
    layout = Layout(mesh, activations=activations)
    loaded = formats.load(path, TINY, layout=layout)
    assert_same(loaded, params)
    for x, like in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(abstract(TINY, layout)), strict=True
    ):
        assert x.sharding == like.sharding
    up = loaded["encoder"]["blocks"]["mlp"]["up"]["kernel"]
    assert (
        isinstance(up.sharding, NamedSharding) and up.addressable_shards[0].data.size * 4 == up.size
    )
    formats.save(loaded, TINY, tmp_path / f"again{path.suffix}", kind)
    assert (tmp_path / f"again{path.suffix}").read_bytes() == path.read_bytes()
    assert_same(formats.load(tmp_path / f"again{path.suffix}", TINY), params)


def test_the_tree_to_fill_may_be_given(tmp_path):
    path, params = saved(tmp_path, TINY)
    like = jax.device_put(jax.tree.map(np.zeros_like, params), jax.devices()[3])
    loaded = formats.load(path, TINY, like)
    assert_same(loaded, params)
    assert loaded["head"]["bias"].devices() == {jax.devices()[3]}


def renamed(*pairs, prefix=""):
    def change(arrays):
        found = {}
        for name, x in arrays.items():
            name = name.removeprefix("params/")
            for old, new in pairs:
                name = name.replace(old, new)
            found[prefix + name] = x
        return found

    return change


BLOCKS = [f"encoderblock_{i}/" for i in range(TINY.depth)]
OLD_NAMES = (
    ("LayerNorm_1/", "LayerNorm_2/"),
    *(
        (f"{b}MultiHeadDotProductAttention_0/", f"{b}MultiHeadDotProductAttention_1/")
        for b in BLOCKS
    ),
    *((f"{b}MlpBlock_0/", f"{b}MlpBlock_3/") for b in BLOCKS),
    ("pos_embedding", "Transformer/posembed_input/pos_embedding"),
)


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/img/"])
def test_big_visions_other_names_and_prefixes(prefix, tmp_path):
    config = config_of({"pool": "cls"})
    path, params = saved(tmp_path, config, "bigvision")
    changed(path, renamed(*OLD_NAMES, prefix=prefix))
    if prefix:  # the other tower, or the optimiser's moments
        others = {"params/t": np.zeros(1), "opt/state/step": np.zeros(1)}
        changed(path, lambda arrays: arrays | others)
    assert_same(formats.load(path, config), params)


def test_big_visions_inlined_pooling_head(tmp_path):
    path, params = saved(tmp_path, TINY, "bigvision")
    changed(path, renamed(("MAPHead_0/", "")))
    assert_same(formats.load(path, TINY), params)


def test_big_visions_scan_over_layers(tmp_path):
    path, params = saved(tmp_path, TINY, "bigvision")

    def stacked(arrays):
        block = "params/Transformer/encoderblock_{}/"
        rest = {n: x for n, x in arrays.items() if "encoderblock" not in n}
        inner = [n.removeprefix(block.format(0)) for n in arrays if n.startswith(block.format(0))]
        return rest | {
            f"params/Transformer/encoderblock/{name}": np.stack(
                [arrays[block.format(i) + name] for i in range(TINY.depth)]
            )
            for name in inner
        }

    changed(path, stacked)
    assert_same(formats.load(path, TINY), params)
    assert formats.config_of(path, dtype="float32") == TINY


def test_bfloat16_that_numpy_took_for_two_bytes(tmp_path):
    path, params = saved(tmp_path, TINY, "bigvision")
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)

    def narrow(arrays):
        return {n: x.astype(ml_dtypes.bfloat16).view("V2") for n, x in arrays.items()}

    changed(path, narrow)
    with np.load(path) as file:
        assert file["params/head/bias"].dtype == np.dtype("V2")
    loaded = formats.load(path, TINY)
    assert_same(loaded, jax.tree.map(lambda x: x.astype(np.float32), rounded))
    formats.save(rounded, TINY, tmp_path / "narrow.safetensors")
    assert_same(formats.load(tmp_path / "narrow.safetensors", TINY), loaded)


def test_big_visions_class_token_without_a_position(tmp_path):
    """Today's adds none, so its row is zero."""
    config = config_of({"pool": "cls"})
    path, params = saved(tmp_path, config, "bigvision")
    changed(path, lambda a: a | {"params/pos_embedding": a["params/pos_embedding"][:, 1:]})
    params["position"][:, 0] = 0
    assert_same(formats.load(path, config), params)
    assert formats.config_of(path, dtype="float32") == config


@pytest.mark.parametrize("kind", ["timm", "transformers_vit", "bigvision"])
def test_positions_of_another_grid(kind, tmp_path):
    config = config_of({"pool": "cls"})
    path, params = saved(tmp_path, config, kind)
    larger = dataclasses.replace(config, image_size=(24, 20))
    with pytest.raises(ValueError, match=r"\(1, 17, 32\), and the model has .*\(1, 31, 32\)"):
        formats.load(path, larger)
    with pytest.raises(ValueError, match="resample=True"):
        formats.load(path, larger)
    loaded = formats.load(path, larger, resample=True)
    fixed, learned = np.split(params["position"], [1], axis=1)
    np.testing.assert_array_equal(loaded["position"][:, :1], fixed)
    np.testing.assert_array_equal(loaded["position"][:, 1:], resample(learned, (4, 4), (6, 5)))
    del loaded["position"], params["position"]
    assert_same(loaded, params)


def test_positions_of_a_grid_that_is_not_square(tmp_path):
    config = config_of({"image_size": (8, 24), "pool": "gap"})
    path, params = saved(tmp_path, config, "timm")
    with pytest.raises(ValueError, match=r"resample=\(rows, columns\)"):
        formats.load(path, TINY_GAP, resample=True)
    loaded = formats.load(path, TINY_GAP, resample=(2, 6))
    np.testing.assert_array_equal(loaded["position"], resample(params["position"], (2, 6), (4, 4)))


TINY_GAP = dataclasses.replace(TINY, pool="gap")


@pytest.mark.parametrize("kind", ["ours", "timm", "bigvision", "transformers_vit"])
def test_the_classifier_may_stay_behind(kind, tmp_path):
    config = config_of({"pool": "cls"})
    path, params = saved(tmp_path, config, kind)
    other = dataclasses.replace(config, num_classes=3, head_bias=-2.0)
    with pytest.raises(ValueError, match="head=False leaves the classifier out"):
        formats.load(path, other)
    loaded = formats.load(path, other, head=False)
    np.testing.assert_array_equal(loaded["head"]["kernel"], np.zeros((32, 3)))
    np.testing.assert_array_equal(loaded["head"]["bias"], np.full(3, -2.0))
    without = dataclasses.replace(config, num_classes=None)
    with pytest.raises(ValueError, match=r"has no place in the model, and 1 more.*head=False"):
        formats.load(path, without)
    del loaded["head"], params["head"]
    assert_same(loaded, params)
    assert_same(formats.load(path, without, head=False), params)


@pytest.mark.parametrize("kind, changes", [("timm", {}), ("siglip", {"num_classes": None})])
def test_what_differs_is_named(kind, changes, tmp_path):
    config = config_of(changes)
    path, _ = saved(tmp_path, config, kind)
    (wide,) = (n for n in safetensors.numpy.load_file(path) if n.endswith(".1.mlp.fc1.bias"))
    changed(path, lambda arrays: arrays | {wide: np.zeros(65, np.float32)})
    name = wide.removeprefix("vision_model.").replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"{name} is float32\(65,\), .* has float32\(64,\)"):
        formats.load(path, config)
    changed(path, lambda arrays: {n: x for n, x in arrays.items() if n != wide})
    with pytest.raises(ValueError, match=f"{path} as {kind}: {name} is missing$"):
        formats.load(path, config)
    changed(path, lambda arrays: arrays | {wide: np.zeros(64)})
    with pytest.raises(ValueError, match=r"is float64\(64,\), and the model has float32\(64,\)"):
        formats.load(path, config)


def test_what_timm_has_and_we_do_not_comes_with_advice(tmp_path):
    path, _ = saved(tmp_path, TINY_GAP, "timm")
    changed(path, lambda a: {n.replace("norm.", "fc_norm.") if n.startswith("norm.") else n: x
                             for n, x in a.items()})  # fmt: skip
    with pytest.raises(ValueError, match="make timm's with fc_norm=False"):
        formats.load(path, TINY_GAP)


@pytest.mark.parametrize("kind", ["ours", "transformers_vit"])
def test_what_no_shape_shows_is_compared_with_what_the_file_states(kind, tmp_path):
    config = config_of({"pool": "cls"})
    path, params = saved(tmp_path, config, kind)
    with pytest.raises(ValueError, match=r"activation='gelu_tanh', and the config has .*='gelu'"):
        formats.load(path, dataclasses.replace(config, activation="gelu"))
    with pytest.raises(ValueError, match="heads=4, and the config has heads=8"):
        formats.load(path, dataclasses.replace(config, heads=8))
    if kind == "transformers_vit":
        path.with_name("config.json").unlink()
        assert_same(
            formats.load(path, dataclasses.replace(config, heads=8))["encoder"]["norm"],
            params["encoder"]["norm"],
        )


@pytest.mark.parametrize(
    "kind, changes, reason",
    [
        ("bigvision", VIT_22B, "standard"),
        ("siglip", {}, "takes the mean"),
        ("siglip", {"pool": "cls"}, "no class token"),
        ("siglip", {"image_size": (8, 16), "num_classes": None}, "square"),
        ("transformers_vit", {}, "pool='cls', not 'map'"),
        ("transformers_vit", VIT_22B, "standard"),
        ("timm", {"style": vit.Style(out_bias=False)}, "out_bias=True"),
        ("timm", {"head_style": vit.VIT_22B}, "attention pooling has all biases"),
    ],
)
def test_models_that_a_format_has_not_are_refused(kind, changes, reason, tmp_path):
    config = config_of(changes)
    params = random(config)
    with pytest.raises(ValueError, match=f"{kind} has no such model: .*{reason}"):
        formats.save(params, config, tmp_path / "model", kind)
    with pytest.raises(ValueError, match=f"{kind} has no such model: .*{reason}"):
        formats.load(saved(tmp_path, TINY, "ours")[0], config, format=kind)


def test_files_that_are_none(tmp_path):
    path, params = saved(tmp_path, TINY)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="is damaged"):
        formats.load(path, TINY)
    path.write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(ValueError, match="saved again by safetensors"):
        formats.load(path, TINY)
    safetensors.numpy.save_file({"a": np.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"no known format \(bigvision, .*are called a"):
        formats.load(path, TINY)
    with pytest.raises(ValueError, match="as timm: its names are others, such as a"):
        formats.load(path, TINY, format="timm")
    with pytest.raises(FileNotFoundError):
        formats.load(tmp_path / "none.npz", TINY)
    with pytest.raises(ValueError, match="no format 'tim': there are bigvision"):
        formats.load(path, TINY, format="tim")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has 0 files of weights"):
        formats.load(tmp_path / "empty", TINY)
    with pytest.raises(ValueError, match=r"format ours ends in \.safetensors"):
        formats.save(params, TINY, tmp_path / "model.npz")
    del params["head"]
    with pytest.raises(ValueError, match=r"head.bias is not in both"):
        formats.save(params, TINY, tmp_path / "model.safetensors")


def test_a_damaged_npz(tmp_path):
    path, _ = saved(tmp_path, TINY, "bigvision")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="is damaged"):
        formats.load(path, TINY)


def test_one_model_in_several_files(tmp_path):
    """As transformers saves a large one."""
    config = config_of({"pool": "cls"})
    path, params = saved(tmp_path, config, "transformers_vit")
    arrays = safetensors.numpy.load_file(path)
    ordered = sorted(arrays)
    parts = {"a.safetensors": ordered[::2], "b.safetensors": ordered[1::2]}
    for file, part in parts.items():
        safetensors.numpy.save_file({name: arrays[name] for name in part}, path.with_name(file))
    index = {name: file for file, part in parts.items() for name in part}
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    path.unlink()
    assert_same(formats.load(path.parent, config), params)
    assert formats.config_of(path.parent, dtype="float32") == config


def test_others_read_our_files(tmp_path):
    """The header and the order of bytes are those of safetensors and numpy."""
    path, params = saved(tmp_path, TINY)
    assert_same(
        [*safetensors.numpy.load_file(path).values()],
        [x for _, x in sorted(zip(names(params), jax.tree.leaves(params), strict=True))],
    )
    path, _ = saved(tmp_path / "npz", TINY, "bigvision")
    with np.load(path) as file:
        np.testing.assert_array_equal(file["params/head/bias"], params["head"]["bias"])


def test_a_dtype_that_no_parameter_has(tmp_path):
    path = tmp_path / "eight.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(1, np.complex64)}, path)
    with pytest.raises(ValueError, match="a is of the dtype C64; save it as F32"):
        formats.load(path, TINY)

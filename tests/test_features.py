"""The frozen tower: its features are the model's, wherever it runs and however often it stops."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image

from collective_matmul import Layout, make_mesh
from models import features, formats, vit
from models.arrays.tree import abstract
from models.data import Data, digits, splits
from models.features import __main__ as command

pytestmark = pytest.mark.slow

MODEL = vit.variant("mu/2", width=32, mlp_dim=64, image_size=8, channels=1, num_classes=10,
                    parallel=True, style=vit.VIT_22B, dtype="float32")  # fmt: skip
ROOT = pathlib.Path(__file__).parents[1]
LAYERS = ("pooled", "tokens", "block_1/output", "logits")


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), abstract(MODEL, None)
    )


@pytest.fixture(scope="module")
def weights(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    formats.save(params, MODEL, path)
    return path


@pytest.fixture(scope="module")
def wanted(params):
    """What the model says of all test images, in one batch."""
    images = digits()[1].images
    graph = nnx.graphdef(nnx.eval_shape(lambda: vit.ViT(MODEL, layout=None, rngs=nnx.Rngs(0))))
    names = ("pooled", "encoded", "block_1/output", "logits")
    _, found = jax.jit(lambda p, x: nnx.merge(graph, p)(x, capture=names))(
        params, jnp.asarray(images)
    )
    return {name: np.asarray(x) for name, x in found.items()}


def extracted(tower, batch=100, **options):
    parts = list(features.extract(tower, digits()[1], Data(), batch, **options))
    names = [name for part, _ in parts for name in part]
    return names, {name: np.concatenate([x[name] for _, x in parts]) for name in parts[0][1]}


def assert_features(arrays, wanted, rows=slice(None), tolerance=1e-5):
    for name in wanted:
        np.testing.assert_allclose(
            arrays[name], wanted[name][rows], rtol=tolerance, atol=tolerance, err_msg=name
        )
    np.testing.assert_array_equal(arrays["index"], np.arange(360)[rows])
    np.testing.assert_array_equal(arrays["label"], digits()[1].labels[rows])


def test_features_are_the_models(params, wanted):
    tower = features.Tower(params, MODEL, layers=LAYERS)
    assert tower.shapes == {"pooled": (32,), "encoded": (16, 32), "block_1/output": (16, 32),
                            "logits": (10,)}  # fmt: skip
    names, arrays = extracted(tower)
    assert names[:2] == ["digits/0", "digits/1"] and len(names) == 360
    assert_features(arrays, wanted)
    _, middle = extracted(tower, start=1, stop=3)
    assert_features(middle, wanted, slice(100, 300))


@pytest.mark.parametrize("activations", ["tokens", "features"])
def test_features_of_a_mesh(weights, wanted, activations):
    mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8])
    layout = Layout(mesh, activations=activations, algorithm="ring", backend="xla")
    tower = features.Tower(
        formats.load(weights, MODEL, layout=layout), MODEL, layers=LAYERS, layout=layout
    )
    assert_features(extracted(tower, batch=96)[1], wanted, tolerance=1e-4)
    with pytest.raises(ValueError, match="choose a multiple of 8"):
        extracted(tower, batch=100)


def test_layers_that_are_none(params):
    with pytest.raises(ValueError, match="no activation is called 'block_2/output'; there are"):
        features.Tower(params, MODEL, layers=("block_2/output",))
    with pytest.raises(ValueError, match=r"pool/\w+ is of the batch as a whole"):
        features.Tower(params, MODEL, layers=("pool/*",))


def options(weights, out, **changes):
    return command.Options(
        **{"model": MODEL, "weights": weights, "images": "digits", "out": out, "layers": LAYERS,
           "batch": 32, "file_images": 64} | changes
    )  # fmt: skip


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_what_was_interrupted_goes_on(weights, wanted, tmp_path, monkeypatch, capsys):
    """Finished files stay as they are; the others are the same as without the interruption."""
    write, made = features.Folder.write, []

    def interrupted(self, number, parts):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(number)
        write(self, number, parts)

    monkeypatch.setattr(features.Folder, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.write(options(weights, tmp_path))
    monkeypatch.undo()
    assert made == [0, 1, 2] and len(files(tmp_path)) == 3
    with pytest.raises(ValueError, match="has 3 of 6 files: run the same command again"):
        features.read(tmp_path)
    damaged = tmp_path / "features-00001-of-00006.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    before = files(tmp_path)
    command.write(options(weights, tmp_path))
    assert "2 of 6 files are there" in capsys.readouterr().out
    after = files(tmp_path)
    same = {name for name in before if before[name] == after[name]}
    assert same == {f"features-{i:05}-of-00006.safetensors" for i in (0, 2)}
    names, arrays = features.read(tmp_path)
    assert names == [f"digits/{i}" for i in range(360)]
    assert_features(arrays, wanted)
    command.write(options(weights, tmp_path))
    assert "6 of 6 files are there" in capsys.readouterr().out
    assert files(tmp_path) == after


def test_another_extraction_in_the_same_folder_is_refused(weights, params, tmp_path):
    command.write(options(weights, tmp_path / "out"))
    with pytest.raises(ValueError, match=r"layers was \['pooled', .*, and is \['pooled'\]; choose"):
        command.write(options(weights, tmp_path / "out", layers=("pooled",)))
    exact = dataclasses.replace(MODEL, unroll=2)
    with pytest.raises(ValueError, match=r"model\.unroll was 1, and is 2"):
        command.write(options(weights, tmp_path / "out", model=exact))
    other = jax.tree.map(lambda x: x, params)
    other["encoder"]["norm"]["scale"] = other["encoder"]["norm"]["scale"] + np.float32(1)
    formats.save(other, MODEL, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="features of another extraction: weights was"):
        command.write(options(tmp_path / "other.safetensors", tmp_path / "out"))


def test_a_classifier_is_read_only_for_logits(weights, wanted, tmp_path):
    command.write(options(weights, tmp_path, layers=("pooled",), dtype="float16"))
    plan = json.loads((tmp_path / "index.json").read_text())["plan"]
    assert plan["model"]["num_classes"] is None
    _, arrays = features.read(tmp_path)
    assert arrays["pooled"].dtype == np.float16
    np.testing.assert_allclose(arrays["pooled"], wanted["pooled"], rtol=2e-3, atol=2e-3)


def test_the_command_reads_a_folder_of_images(weights, tmp_path, capsys):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (5, 8, 8), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        place = tmp_path / "images" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{number}.png")
    asked = ["file", "--weights", str(weights), "--images", str(tmp_path / "images"), "--out",
             str(tmp_path / "out"), "--layers", "pooled", "logits", "--batch", "2",
             "--file-images", "4", "--model.dtype", "float32"]  # fmt: skip
    command.main(asked)
    assert "pooled [32]" in capsys.readouterr().out
    names, arrays = features.read(tmp_path / "out")
    assert names == ["a/0.png", "a/2.png", "a/4.png", "b/1.png", "b/3.png"]
    assert arrays["label"].tolist() == [0, 0, 0, 1, 1]

    source = Data(source="folder", path=tmp_path / "images", test_path=tmp_path / "images")
    _, split = splits(source, image_shape=(8, 8), channels=1, classes=None, seed=0)
    tower = features.Tower(formats.load(weights, MODEL), MODEL, layers=("pooled", "logits"))
    ((same, alone),) = features.extract(tower, split, source, 5)
    assert same == names
    np.testing.assert_allclose(arrays["logits"], alone["logits"], rtol=1e-5, atol=1e-5)

    (tmp_path / "images" / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2\.png is not a readable image"):
        command.main([*asked[:-1], "float32", "--out", str(tmp_path / "other")])
    without = [*asked, "--out", str(tmp_path / "other"), "--skip-bad-images", "True"]
    command.main(without)
    assert features.read(tmp_path / "other")[0] == [n for n in names if n != "a/2.png"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["digit"], "did you mean 'digits'"),
        (["Q/16"], "no variant 'Q/16'"),
        (["file", "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["file"], "name them: --weights FILE"),
        ([], "MODEL is an experiment"),
    ],
)
def test_models_that_are_none(arguments, said):
    with pytest.raises(SystemExit, match=said):
        command.from_command_line(arguments)


def test_a_variant_and_its_fields(weights, tmp_path):
    given = ["B/16", "--weights", str(weights), "--images", "digits", "--out", str(tmp_path)]
    found = command.from_command_line([*given, "--model.image-size", "384", "--mesh", "2,1,4"])
    assert found.model == dataclasses.replace(vit.variant("B/16"), image_size=384)
    assert (found.mesh, found.devices) == ((2, 1, 4), 8)


def test_others_read_the_files(weights, tmp_path):
    command.write(options(weights, tmp_path, layers=("pooled",)))
    first = safetensors.numpy.load_file(tmp_path / "features-00000-of-00006.safetensors")
    assert {name: x.shape for name, x in first.items()} == {
        "pooled": (64, 32), "label": (64,), "index": (64,)
    }  # fmt: skip


def test_two_processes_write_what_one_does(weights, wanted, tmp_path):
    """Each its own rows; the weights lie across both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    asked = ["file", "--weights", str(weights), "--images", "digits", "--out", str(tmp_path),
             "--layers", *LAYERS, "--batch", "64", "--file-images", "200", "--model.dtype",
             "float32", "--mesh", "1,2,2", "--algorithm", "ring"]  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "models.features", *asked],
            cwd=ROOT,
            env=os.environ
            | {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
            | {"JAX_PROCESS_ID": str(number)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert "2 of 2" in said[0] and said[1].count("file ") == 0
    assert len(files(tmp_path)) == 4
    own = safetensors.numpy.load_file(tmp_path / "features-00000-of-00002.1.safetensors")
    assert own["index"][:33].tolist() == [*range(32, 64), 96]
    names, arrays = features.read(tmp_path)
    assert len(names) == 360
    assert_features(arrays, wanted, tolerance=1e-4)

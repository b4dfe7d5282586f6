"""Training: the same losses wherever it runs, and what a run leaves behind."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from collective_matmul import algorithms
from models import configs, data, devices, formats, step, train
from models.optim import Optim
from models.reporting import metrics
from models.vit import VIT_22B, variant

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
MESHES = [(2, 1, 4), (2, 1, 2), (1, 1, 8), (1, 2, 4)]
LAYOUTS = ["tokens", "features"]
TOLERANCE = 2e-6  # of a loss in float32, over five updates
BFLOAT16_TOLERANCE = 5e-3

SMALL = dataclasses.replace(
    configs.load("digits"),
    model=variant(
        "mu/2",
        width=32,
        mlp_dim=64,
        image_size=8,
        channels=1,
        num_classes=10,
        parallel=True,
        style=VIT_22B,
        head_bias=-2.2,
        dtype="float32",
    ),
    optim=Optim(lr=1e-2, warmup=0, timescale=10, cooldown=2),
    steps=8,
    batch=16,
)


def losses(config, updates=5):
    """The losses of the first updates, all on one batch."""
    layout = devices.layout_of(config)
    rows = step.rows_held(layout, config.batch)
    images = data.digits()[0]
    batch = data.train_batch(images, config.batch, config.data.augment, seed=0, step=0, rows=rows)
    batch = step.place(batch, layout)
    graph, state = step.create(config, layout)
    train_step = step.compile_training(graph, config, state, batch)
    found = []
    for _ in range(updates):
        state, numbers = train_step(state, batch)
        found.append(float(numbers["loss"]))
    return found


@pytest.fixture(scope="module")
def one_device():
    found = losses(dataclasses.replace(SMALL, mesh=(1, 1, 1)))
    assert found[-1] < 0.9 * found[0], "the parameters do not change: nothing would be compared"
    return found


NAMES = ["ring", *(name for name in algorithms.names() if name != "ring")]
# Each mesh with both layouts and each algorithm with both, without the whole product of them.
CASES = [
    (mesh, layout, NAMES[(MESHES.index(mesh) + turn) % len(NAMES)])
    for turn, layout in enumerate(LAYOUTS)
    for mesh in MESHES
]


@pytest.mark.parametrize("mesh, layout, algorithm", CASES)
def test_losses_are_those_of_one_device(one_device, mesh, layout, algorithm):
    config = dataclasses.replace(SMALL, mesh=mesh, layout=layout, algorithm=algorithm)
    np.testing.assert_allclose(losses(config), one_device, rtol=TOLERANCE)


def test_losses_in_bfloat16():
    """Rounded in another order, they agree to some of bfloat16's three digits."""
    half = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, dtype="bfloat16"))
    expected = losses(dataclasses.replace(half, mesh=(1, 1, 1)))
    found = losses(dataclasses.replace(half, mesh=(1, 2, 4), layout="features"))
    np.testing.assert_allclose(found, expected, rtol=BFLOAT16_TOLERANCE)


def small_run(out, **changes):
    return dataclasses.replace(
        SMALL,
        optim=Optim(lr=1e-2, warmup=5, timescale=20, cooldown=10),
        mesh=(2, 1, 4),
        steps=40,
        evaluate=20,
        batch=64,
        out=out,
        **changes,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run through the whole of the trainer: its config, and the accuracy it returned."""
    config = small_run(tmp_path_factory.mktemp("runs") / "short")
    return config, train.train(config).accuracy


def test_the_loss_falls(finished):
    config, accuracy = finished
    trained = [r for r in metrics.read(config.out / "metrics.jsonl") if "loss" in r]
    assert [record["step"] for record in trained] == list(range(1, 41))
    assert np.mean([r["loss"] for r in trained[-5:]]) < 0.9 * trained[0]["loss"]
    assert accuracy > 0.2, "no better than guessing"


def test_each_evaluation_is_a_line(finished):
    config, accuracy = finished
    tested = [r for r in metrics.read(config.out / "metrics.jsonl") if "test_loss" in r]
    assert [record["step"] for record in tested] == [20, 40]
    assert tested[-1]["test_accuracy"] == accuracy
    assert accuracy * 360 == pytest.approx(round(accuracy * 360)), "a share of all 360 images"


def test_every_line_is_json(finished):
    lines = (finished[0].out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    fields = {"step", "loss", "accuracy", "gradient_norm", "learning_rate"}
    fields |= {"applied", "bad_streak", "skipped"}
    fields |= {"images_per_second", "tokens_per_second_per_device", "data_wait", "seconds"}
    assert [set(json.loads(line)) for line in lines[:20]] == [fields] * 20
    assert json.loads((finished[0].out / "config.json").read_text())["steps"] == 40


def test_the_weights_are_an_ordinary_checkpoint_that_gives_the_same_answers(finished):
    """Read back into a model on one device, they classify as the run said at its end."""
    config, accuracy = finished
    alone = dataclasses.replace(config, mesh=(1, 1, 1), seed=1)
    graph, state = step.create(alone, None)
    params = formats.load(config.out / "weights.safetensors", config.model, state.params)
    assert params["encoder"]["blocks"]["mlp"]["up"]["kernel"].shape == (2, 32, 64)
    test_images = data.digits()[1]
    (batch,) = data.eval_batches(test_images, data.Data(), len(test_images))
    _, correct, count = step.eval_step(params, step.place(batch, None), graph=graph, config=alone)
    assert abs(float(correct) - accuracy * float(count)) <= 1, "more than a tie differs"


def test_weights_of_another_model_are_refused(finished):
    model, path = finished[0].model, finished[0].out / "weights.safetensors"
    params = step.create(finished[0], devices.layout_of(finished[0]))[1].params
    like = formats.load(path, model, params)
    like["head"]["kernel"] = np.zeros((32, 11), np.float32)
    with pytest.raises(ValueError, match=r"head.kernel is float32\(32, 10\).*float32\(32, 11\)"):
        formats.load(path, model, like)
    del like["head"]
    with pytest.raises(ValueError, match=r"head.bias has no place in the model, and 1 more"):
        formats.load(path, model, like)


def test_the_curves_are_a_picture(finished):
    from matplotlib.image import imread

    picture = imread(finished[0].out / "curves.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 800
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 100, "it is empty"


def test_nothing_half_written_is_left(finished):
    names = sorted(path.name for path in finished[0].out.iterdir())
    assert names == ["config.json", "curves.png", "metrics.jsonl", "weights.safetensors"]


@pytest.fixture(scope="module")
def cut_three_ways():
    """A config whose mesh has an fsdp axis too, and its graph and state."""
    config = dataclasses.replace(SMALL, mesh=(1, 2, 4))
    return config, *step.create(config, devices.layout_of(config))


def test_parameters_and_moments_lie_where_the_layout_says(cut_three_ways):
    """Each device holds its piece alone, also of the optimiser's moments."""
    _, _, state = cut_three_ways
    adam = state.moments[1]
    for tree in (state.params, adam.mu, adam.nu):
        kernel = tree["encoder"]["blocks"]["mlp"]["up"]["kernel"]
        assert kernel.shape == (2, 32, 64)
        assert {piece.data.shape for piece in kernel.addressable_shards} == {(2, 16, 16)}


def test_the_abstract_state_is_the_state_without_its_numbers(cut_three_ways):
    """A program for devices that are not there is compiled from it."""
    config, graph, state = cut_three_ways
    abstract_graph, abstract = step.abstract(config, devices.layout_of(config))
    assert abstract_graph == graph

    def described(x):
        return x.shape, x.dtype, x.sharding.spec

    assert jax.tree.map(described, abstract) == jax.tree.map(described, state)
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(abstract))


def test_a_step_moves_everything_by_the_lanes(cut_three_ways):
    """Forward and backward, no plain collective gathers or scatters what the layers need."""
    config, graph, state = cut_three_ways
    batch = data.train_batch(data.digits()[0], config.batch, config.data.augment, seed=0, step=0)
    places = jax.tree.map(lambda x: x.sharding, state.params)
    jaxpr = jax.make_jaxpr(
        functools.partial(step.train_step, graph=graph, config=config, places=places)
    )(state, batch)
    used = set(re.findall(r" = (\w+)\[", str(jaxpr)))
    assert "ppermute" in used
    assert not {name for name in used if re.match("all_gather|reduce_scatter|all_to_all", name)}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesh": (2, 1, 16)}, r"2 x 1 x 16 = 32 devices .* there are 16 .*--mesh 1,1,16"),
        ({"mesh": (0, 1, 4)}, r"mesh=\(0, 1, 4\)"),
        ({"batch": 12}, r"batch=12 does not split over .* 2 x 4 devices.* a multiple of 8"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"algorithm": "rings"}, "Did you mean 'ring'"),
        ({"model": dataclasses.replace(SMALL.model, num_classes=9)}, "num_classes=9 are too few"),
        (
            {"mesh": (1, 1, 3), "batch": 12},
            r"does not split over .*=3 devices; the nearest sizes that do are",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_it_compiles(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.train(dataclasses.replace(SMALL, out=tmp_path, **changes))


def command(*arguments, **variables):
    """`python -m models.train ...` as a user types it."""
    return subprocess.run(
        [sys.executable, "-m", "models.train", *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ([], 1, "digits"),
        (["--help"], 0, "digits"),
        (["digit"], 1, "did you mean 'digits'?"),
        (["digits", "--stepz", "3"], 2, "--steps"),
        (["digits", "--optim.lr", "high"], 2, "--optim.lr"),
        (["digits", "--mesh", "2,4"], 2, "--mesh"),
        (["digits", "--steps", "0"], 2, "steps=0 must be at least 1"),
    ],
)
def test_the_command_line_says_what_it_did_not_understand(capsys, arguments, status, message):
    with pytest.raises(SystemExit) as ended:
        configs.from_command_line(arguments)
    shown = capsys.readouterr()
    code = ended.value.code
    text = shown.out + shown.err + (code if isinstance(code, str) else "")
    assert (1 if isinstance(code, str) else code or 0) == status
    assert message in text


def test_fields_change_from_the_command_line():
    changes = "--mesh 1,2,4 --layout features --algorithm None --optim.lr 0.5 --out a/b"
    config = configs.from_command_line(["digits", *changes.split()])
    assert (config.mesh, config.layout, config.algorithm) == ((1, 2, 4), "features", None)
    assert (config.optim.lr, config.out) == (0.5, pathlib.Path("a/b"))
    assert config.model == configs.load("digits").model


def test_the_readmes_command(tmp_path):
    """It trains to the end: at least 97% of the test images, on 2 x 4 devices, by the ring."""
    out = tmp_path / "digits"
    patient = "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # else as users run it
    ran = command("digits", "--out", str(out), XLA_FLAGS=patient)
    assert ran.returncode == 0, ran.stderr
    assert str(out) in ran.stdout
    tested = [record for record in metrics.read(out / "metrics.jsonl") if "test_loss" in record]
    assert tested[-1]["test_accuracy"] >= 0.97
    config = configs.load("digits")
    assert (config.mesh, config.algorithm, config.backend) == ((2, 1, 4), "ring", "xla")
    assert {path.name for path in out.iterdir()} >= {"weights.safetensors", "curves.png"}

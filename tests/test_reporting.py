"""What a run tells: sinks that may fail, accounts over restarts, and rates."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from bench.flops import count
from models import configs, dry_run, vit
from models.configs import __main__ as commands
from models.reporting import metrics
from models.reporting.goodput import Ledger
from models.reporting.speed import Speed
from models.reporting.work import model_flops

pytestmark = pytest.mark.slow


class Full:
    """A sink on a disk that is full from the second record on."""

    name = "a full disk"

    def __init__(self):
        self.taken = []
        self.closed = 0

    def write(self, record):
        if self.taken:
            raise OSError(28, "No space left on device")
        self.taken.append(record)

    def close(self):
        self.closed += 1


def test_a_sink_that_fails_is_told_once_and_the_others_go_on(tmp_path):
    said, full = [], Full()
    with metrics.writing(tmp_path, say=said.append) as numbers:
        numbers._sinks.append(full)
        for step in range(1, 5):
            numbers.write(step=step, loss=1.0 / step)
    assert len(full.taken) == 1 and not full.closed
    assert len(said) == 1 and "a full disk takes no more numbers" in said[0]
    assert [record["step"] for record in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path):
    said = []
    (tmp_path / "metrics.jsonl").mkdir()
    with metrics.writing(tmp_path, say=said.append) as numbers:
        numbers.write(step=1, loss=2.0)
    assert numbers.records == [{"step": 1, "loss": 2.0}]
    assert len(said) == 1 and "training goes on without these numbers" in said[0]


def test_a_run_that_goes_on_keeps_the_records_up_to_its_checkpoint(tmp_path):
    with metrics.writing(tmp_path, say=print) as numbers:
        for step in range(1, 8):
            numbers.write(step=step, loss=float(step))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])  # as a kill leaves it
    with metrics.writing(tmp_path, resumed=4, say=print) as numbers:
        numbers.write(step=5, loss=50.0)
    found = [(record["step"], record["loss"]) for record in metrics.read(path)]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]
    with metrics.writing(tmp_path, say=print):
        pass
    assert metrics.read(path) == [], "a new run begins an empty file"


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(json.JSONDecodeError):
        metrics.read(path)


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with metrics.writing(tmp_path, tensorboard=True, say=pytest.fail) as numbers:
        numbers.write(step=3, loss=0.5, note="text", gap=float("nan"))
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, scalars = path.read_bytes(), {}
    while data:  # length (8), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        scalars |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + size :]
    assert scalars == {"loss": (3, 0.5)}


class Clock:
    """Seconds that only move when they are told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def __call__(self):
        return self.now


def test_goodput_counts_what_was_kept(tmp_path, monkeypatch):
    """10 s to step 10, a checkpoint, 6 s more to step 16, killed; 4 s later again from step 10."""
    clock = Clock(monkeypatch)
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path, clock)
    first.begin(0)
    with first.spend("compile"):
        clock.now += 5.0
    clock.now += 10.0
    first.mark(10)
    clock.now += 6.0
    first.mark(16)
    clock.now += 4.0
    second = Ledger(path, clock)
    with second.spend("restore"):
        clock.now += 1.0
    second.begin(10)
    clock.now += 10.0
    found = second.report(20)
    assert second.attempt == found.attempts == 2
    assert found.wall == 36.0 and found.kept == 20.0 and found.lost_steps == 6
    assert found.share == pytest.approx(20 / 36)
    assert found.spent["train"] == 26.0 and found.spent["compile"] == 5.0
    assert "goodput 55.6% of 36.0 s in 2 attempts, 6 steps made twice" in str(found)


def test_a_clock_that_jumps_back_makes_no_time_negative(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    wall = [5000.0]
    ledger = Ledger(tmp_path / "ledger.jsonl", lambda: wall[0])
    clock.now += 3.0
    wall[0] = 10.0
    found = ledger.report(3)
    assert found.wall == 3.0 and found.share == 1.0


@pytest.mark.parametrize(
    "model",
    [
        vit.variant("mu/2", image_size=8, channels=1, num_classes=10, dtype="float32"),
        vit.variant("S/16", depth=2, pool="gap"),
        vit.variant("Ti/16", depth=1, pool="cls", num_classes=None),
        vit.variant("22B/14", depth=1),
    ],
    ids=lambda model: f"{model.width}-{model.pool}",
)
def test_the_closed_form_counts_what_the_traced_model_multiplies(model):
    from flax import nnx

    def forward(images):
        return vit.ViT(model, layout=None, rngs=nnx.Rngs(0))(images)

    shape = (3, *model.image_shape, model.channels)
    traced = count(forward, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert model_flops(model, 3) == 3 * traced.flops


def test_rates():
    speed = Speed(images=32, tokens=16, devices=4, flops=8_000, peak=1_000.0)
    assert speed.rates(2.0) == {
        "images_per_second": 16.0,
        "tokens_per_second_per_device": 64.0,
        "mfu": 1.0,
    }
    assert "mfu" not in dataclasses.replace(speed, peak=None).rates(2.0)


TRACED = """
import pathlib, sys
import jax.numpy as jnp
from models.reporting.config import Report
from models.reporting.profile import Profile
with Profile(Report(profile=2, profile_steps=5), pathlib.Path(sys.argv[1]), print) as profile:
    for step in range(1, 4):
        profile.before(step)
        jnp.ones(4).block_until_ready()
"""


def test_a_trace_that_was_begun_is_written(tmp_path):
    """In a process of its own: jax's profiler does not survive a libtpu that only compiles."""
    ran = subprocess.run(
        [sys.executable, "-c", TRACED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "a profiler trace of 5 steps is in" in ran.stdout
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_the_dry_run_is_taken_out_of_the_command_line():
    assert dry_run.asked(["digits", "--steps", "3"]) == (None, ["digits", "--steps", "3"])
    assert dry_run.asked(["digits", "--dry-run"]) == ("", ["digits"])
    assert dry_run.asked(["digits", "--dry-run", "v5e:2x4", "--steps", "3"]) == (
        "v5e:2x4",
        ["digits", "--steps", "3"],
    )
    assert dry_run.asked(["digits", "--dry-run", "--seed", "3"]) == ("", ["digits", "--seed", "3"])


def dry(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "models.train", *arguments],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


SMALL = ["--model.width", "32", "--model.mlp-dim", "64", "--batch", "16"]


def test_a_dry_run_compiles_for_this_machine_and_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    ran = dry("digits", "--dry-run", *SMALL, "--mesh", "1,1,2", "--out", str(out))
    assert ran.returncode == 0, ran.stderr
    assert "the step compiles for 2 x cpu" in ran.stdout and "GiB of state" in ran.stdout
    assert not out.exists()


def test_a_dry_run_predicts_for_a_slice_and_refuses_another_mesh():
    pytest.importorskip("libtpu", reason="the TPU compiler of the aot extra is not installed")
    ran = dry("digits", "--dry-run", "v5e:2x2", *SMALL, "--mesh", "2,1,2")
    assert ran.returncode == 0, ran.stderr
    assert "predicted for 4 x v5e" in ran.stdout and "MFU" in ran.stdout and "HBM" in ran.stdout
    other = dry("digits", "--dry-run", "v5e:2x2", *SMALL, "--mesh", "2,1,4")
    assert other.returncode == 2
    assert "has 8 devices, and v5e:2x2 has 4" in other.stderr


def test_configs_are_listed_shown_and_compared(capsys):
    assert commands.main(["list"]) == 0
    assert "digits" in capsys.readouterr().out
    assert commands.main(["show", "digits", "--optim.lr", "0.25"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "optim.lr = 0.25" in shown and "data.augment.pixels = 1" in shown
    assert commands.main(["diff", "digits", "digits"]) == 0
    assert commands.main(["diff", "digits", "digit"]) == 2
    assert "did you mean 'digits'?" in capsys.readouterr().err
    assert commands.main([]) == 2


def test_what_a_run_was_asked_for_is_written_whole(tmp_path):
    configs.save(configs.load("digits"), tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["data"]["augment"]["pixels"] == 1 and saved["checkpoint"]["every"] is None

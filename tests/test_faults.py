"""What goes wrong with a whole run, and that nothing is lost: through the trainer, on CPU devices.

Faults of a part alone are tested with it: damaged checkpoints and full disks in the tests of
checkpoints, bad numbers in those of the guard, processes without a trainer in those of the watch.
docs/reliability.md has the list.
"""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from models import configs, train
from models.checkpoint import Checkpoints
from models.reporting.config import Report
from models.reporting.journal import Journal
from models.watch import status
from models.watch.config import Watch

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
PATIENCE = 300  # seconds until a command that hangs is ended

DIGITS = configs.load("digits")
SMALL = dataclasses.replace(
    DIGITS,
    model=dataclasses.replace(DIGITS.model, width=16, mlp_dim=32, depth=1, heads=2),
    mesh=(2, 1, 1),
    batch=16,
    steps=6,
    evaluate=6,
    checkpoint=Checkpoints(every=2),
    watch=Watch(fingerprint_every=1),
    report=dataclasses.replace(Report(), weights=False),
)


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """Programs are compiled once for all runs of this file, and kept in a folder."""
    folder = str(tmp_path_factory.mktemp("programs"))
    variables = {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield variables
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    compilation_cache.reset_cache()  # else jax keeps what other files compile in the old folder


def lines(out, name):
    """{step: number} of one of a run's metrics."""
    found = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in found if name in line}


def small(out, **changes):
    return dataclasses.replace(SMALL, out=out, **changes)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    result = train.train(small(out))
    assert (result.step, result.status) == (6, status.FINISHED)
    chain = lines(out, "fingerprint")
    assert len(chain) == 6 and len(set(chain.values())) == 6
    return out


def at_step(monkeypatch, number, happens):
    """Something happens once step `number` is dispatched."""
    original = Journal.trained

    def trained(self, step, *arguments):
        if step == number:
            happens()
        return original(self, step, *arguments)

    monkeypatch.setattr(Journal, "trained", trained)


# ---- preemption


def test_an_interrupted_run_has_the_chain_of_an_unbroken_one(unbroken, tmp_path, monkeypatch):
    """After every step: it is told to leave, leaves, and is started again."""
    out = tmp_path / "run"
    for step in range(1, 6):
        with monkeypatch.context() as patched:
            at_step(patched, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            left = train.train(small(out))
        assert (left.step, left.status) == (step, 0)
    assert train.train(small(out)).step == 6
    assert lines(out, "fingerprint") == lines(unbroken, "fingerprint")
    assert lines(out, "loss") == lines(unbroken, "loss")


def test_the_chain_tells_another_seed_apart(unbroken, tmp_path):
    train.train(small(tmp_path / "run", seed=1, steps=1))
    assert lines(tmp_path / "run", "fingerprint")[1] != lines(unbroken, "fingerprint")[1]


def test_a_second_sigterm_in_the_middle_of_a_save_leaves_one_whole_checkpoint(
    unbroken, tmp_path, monkeypatch
):
    from models.checkpoint import Folder

    out, original = tmp_path / "run", Folder.save

    def save(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        done = original(self, *arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return done

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "save", save)
        at_step(patched, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        watch = dataclasses.replace(SMALL.watch, preempted_status=75)
        left = train.train(small(out, watch=watch))
    assert left.status == status.PREEMPTED and left.step in (2, 3)
    assert train.train(small(out)).step == 6
    assert lines(out, "fingerprint") == lines(unbroken, "fingerprint")


# ---- silent damage


class Damaging:
    """A training program that flips a bit in the memory of one device, after one of its steps."""

    def __init__(self, program, step):
        self.program, self.step, self.made = program, step, 0

    def lower(self, *arguments):
        self.program = self.program.lower(*arguments)
        return self

    def as_text(self):
        return self.program.as_text()

    def compile(self):
        self.program = self.program.compile()
        return self

    def __call__(self, state, batch):
        state, numbers = self.program(state, batch)
        self.made += 1
        if self.made == self.step:
            scale = state.params["encoder"]["norm"]["scale"]
            with jax.transfer_guard("allow"):
                pieces = [np.array(piece.data) for piece in scale.addressable_shards]
                pieces[1].view(np.uint32)[5] ^= np.uint32(1)  # the least that can be
                devices = [piece.device for piece in scale.addressable_shards]
                pieces = [jax.device_put(p, d) for p, d in zip(pieces, devices, strict=True)]
            scale = jax.make_array_from_single_device_arrays(scale.shape, scale.sharding, pieces)
            state.params["encoder"]["norm"]["scale"] = scale
        return state, numbers


@pytest.mark.parametrize("every, seen", [(1, 3), (2, 4)])
def test_a_flipped_bit_in_one_copy_ends_the_run_before_it_is_saved(
    tmp_path, monkeypatch, every, seen
):
    """And names the parameter and the device, not later than the next comparison."""
    from models import step

    original = step.jitted_training
    monkeypatch.setattr(
        step, "jitted_training", lambda *arguments: Damaging(original(*arguments), step=3)
    )
    out = tmp_path / "run"
    watch = dataclasses.replace(SMALL.watch, replicas_every=every)
    with pytest.raises(status.Fault, match=r"encoder.norm.scale on .*\(data 1") as fault:
        train.train(small(out, watch=watch))
    assert fault.value.status == status.CORRUPTED
    assert max(lines(out, "loss")) <= seen
    saved = {path.name for path in (out / "checkpoints").iterdir() if path.name.isdigit()}
    assert set(map(int, saved)) == {2}, "the damage is in a checkpoint"


# ---- standing still


def test_a_step_that_hangs_dumps_stacks_and_the_run_goes_on(tmp_path, monkeypatch, capfd):
    hung = threading.Event()
    out = tmp_path / "run"

    def until_dumped():
        end = time.monotonic() + 60
        while time.monotonic() < end and not any(
            "in until_dumped" in dump.read_text() for dump in out.glob("stacks*")
        ):
            hung.wait(0.05)

    at_step(monkeypatch, 3, until_dumped)
    watch = dataclasses.replace(SMALL.watch, stall=2.0)
    assert train.train(small(out, watch=watch, checkpoint=Checkpoints())).step == 6
    (dump,) = out.glob("stacks*")
    assert "in until_dumped" in dump.read_text()
    assert "no step for" in capfd.readouterr().err


def test_time_that_is_waited_for_data_is_accounted_as_such(tmp_path, monkeypatch):
    from models import data

    original = data.Stream.__next__

    def slowly(self):
        began = time.monotonic()
        while time.monotonic() - began < 0.2:
            threading.Event().wait(0.2)
        self.waited += time.monotonic() - began
        return original(self)

    monkeypatch.setattr(data.Stream, "__next__", slowly)
    train.train(small(tmp_path / "run"))
    last = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["spent"]["data"] >= 5 * 0.2


# ---- several processes


def flags(config, out):
    """The command line that makes the config."""
    model, mesh = config.model, ",".join(map(str, config.mesh))
    given = shlex.split(
        f"digits --model.width {model.width} --model.mlp-dim {model.mlp_dim} --model.depth "
        f"{model.depth} --model.heads {model.heads} --mesh {mesh} --batch {config.batch} --steps "
        f"{config.steps} --evaluate {config.evaluate} --checkpoint.every {config.checkpoint.every} "
        "--watch.fingerprint-every 1 --report.weights False"
    )
    return [*given, "--out", str(out)]


def supervised(programs, arguments, *options, count=2):
    """`models.supervise ... -- models.train ...`, of two processes with a device each."""
    return subprocess.Popen(
        [sys.executable, "-m", "models.supervise", "--processes", str(count), *options, "--",
         sys.executable, "-m", "models.train", *arguments],
        cwd=ROOT,
        env=os.environ | programs | {"JAX_NUM_CPU_DEVICES": str(2 // count), "NPROC": "16"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def ended(process, code):
    """What a command said, once it ended with this status."""
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.terminate()
    assert process.returncode == code, said
    return said


LONG = dataclasses.replace(SMALL, steps=400, evaluate=400, checkpoint=Checkpoints(every=25))


@pytest.fixture(scope="module")
def two_unbroken(programs, tmp_path_factory):
    """A run of two processes that nothing happened to."""
    out = tmp_path_factory.mktemp("two") / "run"
    ended(supervised(programs, flags(LONG, out), "--restarts", "0"), 0)
    assert len(lines(out, "fingerprint")) == LONG.steps
    return out


def processes_of(supervisor):
    """The ids of a supervisor's processes, the first one first."""
    import psutil

    children = psutil.Process(supervisor.pid).children()
    return [child.pid for child in sorted(children, key=lambda child: child.create_time())]


def until_step(out, step, supervisor):
    """Waits until a run has made a step."""
    end = time.monotonic() + PATIENCE
    while (
        not (out / "metrics.jsonl").exists()
        or f'"step": {step},' not in (out / "metrics.jsonl").read_text()
    ):
        assert supervisor.poll() is None and time.monotonic() < end
        threading.Event().wait(0.05)


def test_a_sigterm_to_one_of_two_processes_saves_and_loses_nothing(
    programs, two_unbroken, tmp_path
):
    """Both leave after the same step, which is saved; started again, the run ends as unbroken."""
    out = tmp_path / "run"
    first = supervised(programs, flags(LONG, out), "--restarts", "0")
    until_step(out, 10, first)
    os.kill(processes_of(first)[1], signal.SIGTERM)
    said = ended(first, 0)
    left = int(re.search(r"left after step (\d+)", said)[1])
    assert (out / "checkpoints" / f"{left:08}").is_dir()
    assert 10 <= left == max(lines(out, "loss")) < LONG.steps
    assert f"going on after step {left}" in ended(supervised(programs, flags(LONG, out)), 0)
    assert lines(out, "fingerprint") == lines(two_unbroken, "fingerprint")


def test_a_run_whose_processes_are_killed_at_random_ends_as_unbroken(
    programs, two_unbroken, tmp_path
):
    """With every step's parameters, bit for bit, and a printed goodput."""
    out = tmp_path / "run"
    chaos = shlex.split("--chaos 8 --kills 3 --restarts 20 --backoff 0.1 --grace 5")
    said = ended(supervised(programs, flags(LONG, out), *chaos), 0)
    assert said.count("chaos: killed process") >= 1, said
    assert "restart 1 of 20" in said
    assert lines(out, "fingerprint") == lines(two_unbroken, "fingerprint")
    assert lines(out, "loss") == lines(two_unbroken, "loss")
    share = re.search(r"goodput ([\d.]+)% of [\d.]+ s in \d+ attempt", said)
    assert 0 < float(share[1]) < 100, said


def test_a_process_with_another_config_is_named_before_anything_is_compiled(tmp_path):
    """Both end, with the status that says that starting again does not help."""
    from models.watch.group import free_port

    address = f"localhost:{free_port()}"
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "models.train", *flags(SMALL, tmp_path / "run"),
             "--optim.lr", str(0.1 + rank), "--watch.coordinator", address,
             "--watch.processes", "2", "--watch.process", str(rank)],
            cwd=ROOT,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in both:
        said = ended(process, status.DISAGREES)
        assert "process 1 has config.optim.lr 1.1 instead of 0.1" in said and "compiled" not in said


def test_without_a_home_or_a_locale_a_run_still_runs(tmp_path, programs):
    """Nor with a folder that cannot be written to as the current one."""
    variables = {k: v for k, v in os.environ.items() if k not in ("HOME", "LANG", "LC_ALL")}
    variables |= programs | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "models.train", *flags(SMALL, tmp_path / "run")],
        cwd="/proc",
        env=variables | {"PYTHONCOERCECLOCALE": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "run", "loss")) == 6


def test_every_fault_of_the_page_has_its_test():
    rows = [
        line
        for line in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
        if "::" in line
    ]
    assert len(rows) > 20
    for row in rows:
        for name, test in re.findall(r"`(\w+\.py)::(\w+)`", row):
            text = (ROOT / "tests" / name).read_text(encoding="utf-8")
            assert f"def {test}(" in text, f"there is no tests/{name}::{test}"

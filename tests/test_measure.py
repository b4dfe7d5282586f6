"""The clock, the lower bounds, and each measuring command once, at its smallest."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import collective_matmul as cm
from bench import commands
from bench.commands import gpu as gpu_command
from bench.commands.measure import result_of
from bench.measured import gpu, gpu_cases, timing
from bench.measured.bounds import bound
from bench.plans import plans
from bench.predicted.operations import MODES, Product
from bench.record import load
from bench.suites.operations import Problem, program
from collective_matmul import algorithms, hardware

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]


def bench(*arguments, **variables):
    """`python -m bench ...` in the checkout, as a user calls it: not within another pytest, whose
    variables tell pytest-benchmark to keep still."""
    alone = {key: x for key, x in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env=alone | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


class Clock:
    """Stands still but for what calls take."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def taking(self, *seconds):
        """A call that takes these seconds, one after the other, and then the last for ever."""
        left = list(seconds)

        def call():
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return "begun"

        return call


def test_times_are_those_after_the_warm_up(monkeypatch):
    waited = []
    times = timing.measure(Clock(monkeypatch).taking(60, 9, 1, 2, 3, 4, 5), waited.append, rounds=5)
    assert times.seconds == (1, 2, 3, 4, 5)
    assert (times.median, times.spread) == (3, 2)
    assert waited == ["begun"] * 7


def test_short_calls_are_repeated_within_a_round(monkeypatch):
    waited = []
    times = timing.measure(
        Clock(monkeypatch).taking(0.25), waited.append, rounds=3, warmup=1, at_least=2.0
    )
    assert times.seconds == (0.25,) * 3
    assert len(waited) == 5  # of 1 + 1 + 3 * 8 calls


def test_a_round_is_needed():
    with pytest.raises(ValueError, match="rounds=0"):
        timing.measure(int, str, rounds=0)


V4 = hardware.chip("v4")
LHS, RHS = (
    jax.ShapeDtypeStruct((2048, 6144), "bfloat16"),
    jax.ShapeDtypeStruct((6144, 512), "bfloat16"),
)


@pytest.mark.parametrize("t, links", [(2, 1), (4, 2)])
def test_a_bound_is_the_longer_of_products_and_travel(t, links):
    told = cm.explain("mk,kn->mn", LHS, RHS, axis_size=t, chip=V4, gather_lhs="m")
    shard = 2048 * 6144 * 2
    wire = (t - 1) * shard / (links * 45e9)
    assert bound(told, 1e9, backward=False, chip=V4).seconds == pytest.approx(wire)
    assert bound(told, 1e9, backward=True, chip=V4).seconds == pytest.approx(2 * wire)
    assert bound(told, 275e12, backward=True, chip=V4).seconds == 1.0


def test_a_scatter_and_its_gradient_move_as_much():
    told = cm.explain("mk,kn->mn", LHS, RHS, axis_size=4, chip=V4, scatter="m")
    wire = 3 * 512 * 512 * 2 / (2 * 45e9)
    assert bound(told, 1.0, backward=False, chip=V4).seconds == pytest.approx(wire)
    assert bound(told, 1.0, backward=True, chip=V4).seconds == pytest.approx(2 * wire)


def test_no_bound_where_nothing_is_known():
    told = cm.explain("mk,kn->mn", LHS, RHS, axis_size=4, chip="cpu", gather_lhs="m")
    assert bound(told, 1e9, backward=False, chip=hardware.chip("cpu")) is None
    one = cm.explain("mk,kn->mn", LHS, RHS, axis_size=1, chip=V4, gather_lhs="m")
    assert bound(one, 275e12, backward=True, chip=V4).link == 0


@pytest.mark.parametrize("mode", MODES)
def test_what_the_suites_time_is_the_product(mode):
    problem = Problem(Product(mode, 8, 16, 32, "float32", grad=True), 4)
    assert problem.work().flops == 4 * 3 * 2 * 8 * 16 * 32
    assert problem.bound() is None  # of a CPU
    plain = program(problem, "unfused", None)()
    ring = program(problem, "xla", "ring")()
    for a, b in zip(jax.tree.leaves(ring), jax.tree.leaves(plain), strict=True):
        assert jnp.abs(a).max() > 0 and jnp.allclose(a, b, atol=1e-3)


def test_every_plan_is_timed():
    every = {(x, name) for x in ("xla", "pallas_tpu") for name in algorithms.names()}
    assert set(plans()) == set(plans(hardware.chip("v4"))) == every | {("unfused", None)}
    timed = {("xla", name) for name in algorithms.names()} | {("unfused", None)}
    assert set(plans(hardware.chip("cpu"))) == timed, "an interpreted kernel has no time to tell"


def test_measure_runs_the_suites_and_reports_ratios(tmp_path):
    path = tmp_path / "measured.json"
    only = "gather and rhs and two_way and not backward or mu and two_way and forward"
    asked = ["--quick", "--devices", "2", "--only", only, "--json", str(path)]
    done = bench("measure", *asked, JAX_NUM_CPU_DEVICES="2")
    assert done.returncode == 0, done.stdout + done.stderr
    record = load(path)
    assert (record.kind, record.chip) == ("measured", "cpu")
    operations, steps = (table["rows"] for table in record.result["tables"])
    (row,), (step,) = operations, steps
    assert row["schedule"] == step["schedule"] == "xla two_way"
    assert row["plain / this"] == pytest.approx(row["plain ms"] / row["median ms"])
    assert step["devices"] == 2 and step["median ms"] > 0
    assert "MFU %" not in step and any("no MFU" in x for x in record.result["remarks"])
    assert "2 devices are simulated" in done.stdout


def test_a_part_that_is_not_there():
    done = bench("measure", "--quick", "--only", "nothing_of_this_name")
    assert done.returncode == 2 and "matches nothing" in done.stderr


def test_a_chip_with_a_peak_gets_its_share_and_its_bound(monkeypatch):
    v4 = type("Device", (), {"device_kind": "TPU v4"})()
    monkeypatch.setattr(jax, "devices", lambda: [v4])
    about = {
        "row": {"model": "a"}, "plain": 3.0, "bound": 1.0, "flops": 275e12, "kind": "model",
        "convention": "", "devices": 1, "dtype": "bfloat16",
    }  # fmt: skip
    result = result_of([{"extra_info": about, "stats": {"median": 2.0, "iqr": 0.1}}])
    (row,) = result["tables"][0]["rows"]
    assert (row["MFU %"], row["lower bound ms"], row["plain / this"]) == (50.0, 1000.0, 1.5)


def test_the_gpus_cases_are_those_of_the_papers():
    found = gpu_cases.cases(tiny=False)
    block = found["22B block x 4"]
    assert (block.config.width, block.config.mlp_dim, block.config.heads) == (6144, 24576, 48)
    assert block.shape == (32, 256, 6144) and block.config.parallel
    # 4 blocks of 12 d^2 parameters and attention over 256 tokens.
    flops = 2 * 4 * 32 * 256 * (12 * 6144**2 + 2 * 256 * 6144)
    assert gpu.work(block, backward=False).flops == flops
    assert gpu.work(block, backward=True).flops == 3 * flops
    assert {"ViT B/16", "ViT L/16", "ViT H/14", "ViT g/14"} < set(found)


def test_our_passes_run():
    whole, block = (
        gpu_cases.cases(tiny=True)["ViT mu/4"],
        gpu_cases.cases(tiny=True)["22B block x 1"],
    )
    assert gpu.prepare(whole, False)[0]().shape == (whole.batch, 10)
    y, (grads, dx) = gpu.prepare(block, True)[0]()
    assert y.shape == dx.shape == block.shape
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert {x.dtype for x in jax.tree.leaves(grads)} == {
        jnp.dtype("bfloat16"),
        jnp.dtype("float32"),
    }


def test_pytorchs_passes_run(timm):
    """The same sizes of everything, of our models and theirs, but for biases."""
    import torch

    from bench.measured import torch_peer

    for case in gpu_cases.cases(tiny=True).values():
        call, wait = torch_peer.prepare(case, True, device="cpu", compiled=False)
        wait(call())
        matrices = [x for x in torch_peer.module(case).parameters() if x.ndim in (2, 4)]
        ours = gpu.function(case)[1]
        kernels = [x for x in jax.tree.leaves(ours) if x.dtype == jnp.bfloat16]
        assert sum(x.numel() for x in matrices) == sum(x.size for x in kernels)
        assert all(x.dtype == torch.float32 for x in matrices)


def test_gpu_runs_on_a_cpu_and_claims_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        gpu_command, "FRAMEWORKS", {"ours, jax": "bench.measured.gpu", "none": "bench.nothing"}
    )
    path = tmp_path / "gpu.json"
    asked = ["--device", "cpu", "--tiny", "--only", "block", "--rounds", "1", "--json", str(path)]
    assert gpu_command.main(asked) == 0
    record = load(path)
    forward, both, *others = record.result["rows"]
    assert (
        forward["median ms"] > 0 and both["pass"] == "forward+backward" and "MFU %" not in forward
    )
    assert [row["note"] for row in others] == [others[0]["note"]] * 2
    assert "No module named bench.nothing" in others[0]["note"]
    assert "no MFU: no peak is published" in capsys.readouterr().out


def test_no_gpu_is_told_in_the_row():
    lines = gpu_command.run(
        "bench.measured.gpu",
        {"case": "22B block x 1", "tiny": True, "rounds": 1, "device": "gpu"},
        patience=120,
    )
    assert [line["pass"] for line in lines] == ["forward", "forward+backward"]
    assert all("is asked for a gpu and has cpu" in line["failed"] for line in lines)
    late = gpu_command.run("bench.measured.gpu", {}, patience=0.0)
    assert "no time was left" in late[0]["failed"]


def test_what_is_asked_for_has_to_be_there():
    with pytest.raises(commands.UserError, match="ViT mu/4"):
        gpu_command.main(["--tiny", "--only", "nothing"])


def test_a_pass_that_fails_leaves_the_other(tmp_path):
    def prepare(case, backward):
        if not backward:
            raise MemoryError("too large\nfor this")
        return (lambda: None), (lambda _: None)

    request = {"case": "ViT mu/4", "tiny": True, "rounds": 2}
    gpu_cases.report(request, tmp_path / "out", prepare, "cpu")
    first, second = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert first["failed"] == "MemoryError: too large" and second["median"] >= 0

"""Predictions: refusals are read, programs are the real ones, tables say who wins."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import pytest

from bench.__main__ import main
from bench.predicted import baselines, comparison, figures, prediction, programs
from bench.predicted.compiling import attempt, read_buffers, read_refusal
from bench.predicted.operations import MODES, Product
from bench.predicted.programs import training_step
from bench.predicted.slices import chip_of, tpu_slice
from bench.record import load
from collective_matmul import Layout, algorithms, make_mesh
from models.config import Config
from models.optim import Optim
from models.vit import variant

from .helpers import needs_compiler

pytestmark = pytest.mark.slow

REFUSAL = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (51.50G) exceeds available HBM (30.75G). HLO module: jit_step."
)
REPORT = """Memory Space: default (color=0)
Total bytes: 89589168128 (83.44GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
   25.00GiB( 36%);   25.00GiB;      2523136;               60; bf16[16384,14,16], 2×f32[8,2], s32[4]
   25.50GiB( 37%);  512.00MiB;     26846068;                1; bf16[65536,2,196,196]
"""


def test_the_compilers_refusal_is_read():
    refusal = read_refusal(REFUSAL)
    assert (refusal.used, refusal.limit) == (51.5 * 2**30, 30.75 * 2**30)
    assert str(refusal) == "out of memory: 51.50 GiB of 30.75 GiB HBM"
    assert read_refusal("INTERNAL: something else (1.0G)") is None


def test_the_largest_buffers_are_read():
    assert read_buffers(REPORT) == (
        (25 * 2**30, "bf16[16384,14,16] and 2 more"),
        (512 * 2**20, "bf16[65536,2,196,196]"),
    )


def small(mesh, batch=16):
    """A ViT that compiles in seconds, and its mesh's sizes."""
    model = variant("mu/14", image_size=28, depth=1, num_classes=8, pool="gap", remat="full")
    return Config(model=model, optim=Optim(), steps=10, batch=batch, mesh=mesh)


@needs_compiler
def test_a_training_step_is_predicted(tmp_path):
    layout = Layout(make_mesh(2, 1, 2, devices=tpu_slice("v5e:2x2")), backend="unfused")
    found = prediction.predict("small", training_step(small((2, 1, 2)), layout))
    assert found.devices == 4 and found.chip.name == "v5e" and found.mesh["tensor"] == 2
    assert found.tokens == 16 * 4 and found.tokens_per_chip == 16
    peak = 4 * 197e12
    assert found.mfu == pytest.approx(found.model.flops / found.seconds / peak)
    assert found.hfu == pytest.approx(found.hardware.flops / found.seconds / peak)
    assert found.report.flops * 4 <= found.hardware.flops, "the compiler adds no products"
    assert found.throughput == pytest.approx(16 / found.seconds)
    kinds = {row.kind for row in found.report.collectives}
    assert {"all-gather", "reduce-scatter"} <= kinds, "what the unfused layers move"
    assert 0 < found.hbm < found.chip.hbm_bytes
    told = str(found)
    assert "predicted for 4 x v5e" in told and "MFU" in told and "accuracy" in told
    json.dumps(found.as_dict())
    figures.comparison(comparison.as_dicts([found]), tmp_path / "bars.png", "a title")
    assert (tmp_path / "bars.png").stat().st_size > 5000


def test_model_flops_are_three_forward_passes():
    """6 N + 12 L H Q T a token, and the patch embedding's and the pooled classifier's products."""
    model = small((1, 1, 1)).model
    d, tokens, f = model.width, 4, model.mlp_dim
    layer = 6 * (4 * d * d + 2 * d * f) + 12 * d * tokens
    once = 6 * model.patch_dim * d
    found = programs.trained_work(model, 16).flops
    assert found == 16 * (tokens * (layer + once) + 6 * d * 8)


@needs_compiler
def test_out_of_memory_is_a_result():
    place = jax.sharding.SingleDeviceSharding(tpu_slice("v5e:1x1")[0])
    array = jax.ShapeDtypeStruct((40_000, 40_000), jnp.float32, sharding=place)
    tried = attempt(jax.jit(lambda x: jnp.sort(x @ x, axis=0) @ x).trace(array))
    assert tried.compiled is None and tried.failure is None
    refusal = tried.out_of_memory
    assert refusal.used > 17 * 2**30 > refusal.limit > 15 * 2**30
    assert refusal.largest[0][0] >= 4 * 40_000**2 and "40000,40000" in refusal.largest[0][1]


@needs_compiler
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_a_program_that_moves_what_it_should(mode):
    mesh = make_mesh(data=2, tensor=2, devices=tpu_slice("v5e:2x2"))
    product = Product(mode, m=512, k=256, n=256, grad=mode == "gather")
    report = prediction.predict(mode, product.program(mesh, "ring", "xla")).report
    permutes = {row.axes: row for row in report.collectives}
    assert set(permutes) == {"tensor"}, "the groups of the data axis are independent"
    size = {"gather": 256 * 256, "gather-contracting": 512 * 128, "gather-rhs": 128 * 256}
    shard = size.get(mode, 256 * 256)
    moved = 3 if product.grad else 1  # the gather for the result, another for rhs, a scatter of lhs
    assert permutes["tensor"].wire_bytes <= moved * 2 * shard
    assert permutes["tensor"].wire_bytes % (2 * shard) == 0
    assert product.explained(2, chip_of(mesh.devices.flat)).op.t == 2


@needs_compiler
def test_the_bare_product_moves_nothing():
    mesh = make_mesh(data=2, tensor=2, devices=tpu_slice("v5e:2x2"))
    product = Product("scatter", m=512, k=256, n=256)
    bare = prediction.predict("bare", product.bare(mesh))
    assert bare.report.collectives == () and bare.report.flops == 2 * 512 * 256 * 256
    assert bare.notes == (), "it reconciles with what was traced"


def test_sizes_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match="k=255 does not split over 2"):
        Product("gather-rhs", 512, 255, 256).shapes(2)
    with pytest.raises(ValueError, match="no mode 'gather_lhs'"):
        Product("gather_lhs", 1, 1, 1)


def test_every_baseline_has_its_layout():
    devices = jax.devices()[:8]
    rows = {row.name: row for row in baselines.everything()}
    assert {baselines.OURS, *algorithms.names(), "unfused", "gspmd", "fsdp"} <= set(rows)
    shapes = {
        name: row.layout(devices, (2, 2, 2), token_dim=0).mesh.devices.shape
        for name, row in rows.items()
    }
    assert shapes["ring"] == (2, 2, 2) and shapes["fsdp"] == (1, 8, 1)
    assert shapes["fsdp x data"] == (2, 4, 1)
    assert rows["gspmd"].layout(devices, (2, 2, 2)).partitioner == "gspmd"
    assert [row.name for row in baselines.named(("gspmd", "ring"))] == ["gspmd", "ring"]
    with pytest.raises(ValueError, match="no baseline 'rings'"):
        baselines.named(("rings",))


@needs_compiler
def test_a_row_that_fails_takes_no_other_with_it(tmp_path, capsys):
    mesh = make_mesh(tensor=4, devices=tpu_slice("v5e:2x2"))
    product = Product("gather", 4096, 1024, 1024)

    def program_of(row):
        if row.name == "ring":
            raise ValueError("not today")
        return product.program(mesh, row.algorithm, row.backend)

    rows = comparison.compare(baselines.named(("ring", "two_way", "unfused")), program_of)
    failed, two_way, unfused = rows
    assert failed == comparison.Failure("ring", "ValueError: not today")
    assert "[1/3] ring" in capsys.readouterr().err
    memory = read_refusal(REFUSAL)
    full = dataclasses.replace(unfused, name="full", report=None, out_of_memory=memory)
    assert comparison.winner(rows) is min((two_way, unfused), key=lambda row: row.seconds)
    lines = comparison.table([failed, two_way, full, unfused]).splitlines()
    assert "the winner" in lines[1] and lines[1].split()[0] in ("two_way", "unfused")
    assert any(line.startswith("full") and "OOM: needs 51.50 GiB" in line for line in lines[3:])
    assert any(
        line.startswith("ring") and "failed: ValueError: not today" in line for line in lines
    )
    figures.comparison(comparison.as_dicts([*rows, full]), tmp_path / "bars.png", "a title")


@needs_compiler
def test_predict_op_tells_whether_the_cost_model_is_right(tmp_path, capsys):
    arguments = ["--m", "1024", "--k", "512", "--n", "512", "--axis-size", "2"]
    arguments += ["--topology", "v5e:2x2", "--out", str(tmp_path)]
    assert main(["predict-op", *arguments]) == 0
    told = capsys.readouterr().out
    assert "bare product" in told and "unfused + XLA" in told and "chosen: " in told
    assert "None chooses well" in told or "None is NOT the best" in told
    assert all(f"xla {name}" in told for name in algorithms.names())
    record = load(tmp_path / "predict-op.json")
    assert (record.kind, record.chip) == ("predicted", "v5e")
    times = {row["name"]: row["seconds"] for row in record.result["rows"]}
    assert times["bare product"] <= min(times.values())
    assert not any(math.isnan(seconds) for seconds in times.values())


def test_the_calibration_error_is_beside_the_number(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "RESULTS", tmp_path)
    v4 = prediction.hardware.chip("v4")
    assert prediction.accuracy(v4).startswith("not calibrated")
    chips = {"v4": {"median_error": 0.07, "worst_error": 0.21, "points": 3}}
    (tmp_path / "calibration.json").write_text(json.dumps({"result": {"chips": chips}}))
    assert "3 published measurements on v4" in prediction.accuracy(v4)
    assert "7% off in the median, 21% at worst" in prediction.accuracy(v4)
    assert prediction.accuracy(prediction.hardware.chip("v5p")).endswith("(only for v4)")


@needs_compiler
def test_a_predictor_that_is_killed_leaves_no_process_behind():
    script = textwrap.dedent("""
        import multiprocessing, time
        from bench.predicted.ways import Predictor, Way
        from bench.predicted.operations import Product
        if __name__ == "__main__":
            way = Way("v5e:2x2", 4, Product("gather", 64, 128, 128), bare=True)
            with Predictor({}) as predictor:
                assert predictor.submit(way, kernel=False).result().seconds > 0
                print(*(each.pid for each in multiprocessing.active_children()), flush=True)
                time.sleep(600)
    """)
    path = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=path, stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert workers
    deadline = time.monotonic() + 30
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_runs, workers))


def _runs(pid):
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # a zombie only waits to be counted

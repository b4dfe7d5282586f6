"""Predictions cost Pallas kernels by their bundles: each is compiled alone, in another process."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from bench.__main__ import main
from bench.predicted import kernels, prediction
from bench.predicted.programs import Program
from bench.predicted.slices import SMALLEST, tpu_slice
from bench.record import ROOT
from bench.work import Work
from collective_matmul import hardware, make_mesh
from collective_matmul.inspect.hlo import parse

from .helpers import needs_compiler

PROGRAM = """HloModule jit_f, is_scheduled=true

ENTRY %main (x: f32[32,32]) -> f32[32,32] {
  %x = f32[32,32]{1,0} parameter(0)
  %a = f32[32,32]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"abc"},"retry_config":{"retry_count":"0"}}
  ROOT %b = f32[32,32]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"def"}}
}
"""


def multiply(x, y, trips=None):
    """A product by a kernel, in blocks of 256; `trips` makes it a loop whose trips are data."""

    def kernel(x, y, out):
        def add(i, total):
            return total + jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

        rounds = 1 if trips is None else pl.program_id(0) + trips
        zeros = jnp.zeros(out.shape, jnp.float32)
        out[...] = (
            add(0, zeros) if trips is None else jax.lax.fori_loop(0, rounds, add, zeros)
        ).astype(out.dtype)

    (m, k), (_, n) = x.shape, y.shape
    flops, size = 2 * m * k * n, x.dtype.itemsize * (m * k + k * n + m * n)
    return pl.pallas_call(
        kernel,
        grid=(m // 256, n // 256),
        in_specs=[
            pl.BlockSpec((256, k), lambda i, j: (i, 0)),
            pl.BlockSpec((k, 256), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((256, 256), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=size, transcendentals=0),
        name="multiply",
    )(x, y)


M, K, N = 2048, 512, 1024


def program(chip, **options):
    """Every device multiplies the same."""
    mesh = make_mesh(data=-1, devices=tpu_slice(SMALLEST[chip]))
    sharding = jax.NamedSharding(mesh, P())
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in ((M, K), (K, N))
    ]
    mapped = jax.shard_map(
        lambda x, y: multiply(x, y, **options),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    work = Work(2 * M * K * N * mesh.size, "model", "a product a device")
    return Program(jax.jit(mapped).trace(*operands), mesh, work, work, "bfloat16")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("chip", ["v4", "v5e", "v6e"])
def test_a_prediction_costs_a_kernel_by_its_bundles(chip):
    found = prediction.predict("kernel", program(chip))
    (op,) = (op for op in found.report.ops if op.name.startswith("multiply"))
    assert op.how == "bundles" and not found.notes
    assert op.seconds >= op.flops / found.chip.bf16
    assert op.flops == 2 * M * K * N
    again = kernels.issued.cache_info().misses
    prediction.predict("again", program(chip))
    assert kernels.issued.cache_info().misses == again, "it is compiled once"


ASKED = """
import unittest.mock
from bench.predicted import kernels, prediction, schedules
schedules.ask()
from tests.test_kernels import program
with unittest.mock.patch.object(kernels.subprocess, "run", side_effect=AssertionError):
    for again in range(2):
        found = prediction.predict("kernel", program("v5e"))
        (op,) = (op for op in found.report.ops if op.name.startswith("multiply"))
        print(op.how, found.notes, op.seconds)
"""


@pytest.mark.slow
@needs_compiler
def test_a_process_that_asked_for_schedules_compiles_no_kernel_alone():
    done = subprocess.run(
        [sys.executable, "-c", ASKED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (op,) = (
        op
        for op in prediction.predict("kernel", program("v5e")).report.ops
        if op.name.startswith("multiply")
    )
    assert done.stdout.splitlines() == [f"bundles () {op.seconds}"] * 2


@pytest.mark.slow
@needs_compiler
def test_a_kernel_whose_trips_are_data_stays_as_declared():
    found = prediction.predict("kernel", program("v5e", trips=2))
    (op,) = (op for op in found.report.ops if op.name.startswith("multiply"))
    assert op.how == "declared"
    assert any("its schedule does not tell how often" in note for note in found.notes)
    assert any("lower bound" in remark for remark in found.report.remarks)


def test_a_kernel_that_does_not_compile_alone_is_a_note(monkeypatch):
    def broken(*arguments, **options):
        raise OSError("no such program")

    monkeypatch.setattr(kernels.subprocess, "run", broken)
    found, notes = kernels.bundles(PROGRAM, hardware.chip("v4"))
    assert found == {}
    assert notes == ("no bundles of a, b: it could not be compiled alone (no such program)",)
    assert kernels.bundles("HloModule jit_f", hardware.chip("v4")) == ({}, ())


def test_a_kernel_that_communicates_is_a_note():
    text = PROGRAM.replace('"body":', '"has_communication":true,"body":')
    found, (note,) = kernels.bundles(text, hardware.chip("v4"))
    assert not found
    assert note.startswith("no bundles of a, b: it communicates")


def test_a_chip_that_the_compiler_does_not_know_is_a_note():
    _, notes = kernels.bundles(PROGRAM, hardware.chip("H200"))
    assert notes == ("no bundles of a, b: the TPU compiler does not know H200",)


def test_a_kernel_is_its_program_and_its_shapes():
    module = parse(PROGRAM)
    kernel = kernels.kernel_of(module, module.main.by_name["a"])
    assert json.loads(kernel.configuration) == {"custom_call_config": {"body": "abc"}}
    assert kernel.operands == kernel.results == (("f32", (32, 32)),)
    assert kernel != kernels.kernel_of(module, module.main.by_name["b"])


def test_where_a_step_keeps_its_arrays_is_no_part_of_a_kernel():
    colours = '"input_memory_space_colors":[{"operand_index":"0","color":"6","shape_index":[]}],'
    kernel, coloured = (
        kernels.kernel_of(module, module.main.by_name["a"])
        for module in (
            parse(PROGRAM),
            parse(PROGRAM.replace('"body":"abc"', colours + '"body":"abc"')),
        )
    )
    assert coloured == kernel


@pytest.mark.slow
@needs_compiler
def test_the_command_lists_kernels(tmp_path, capsys):
    compiled = program("v5e").traced.lower().compile()
    (tmp_path / "step.txt").write_text(compiled.as_text())
    assert main(["kernels", str(tmp_path / "step.txt"), "--chip", "v5e"]) == 0
    head, _, row, *_ = capsys.readouterr().out.splitlines()
    told = dict(zip(head.split("|")[1:-1], row.split("|")[1:-1], strict=True))
    told = {name.strip(): value.strip() for name, value in told.items()}
    assert told["kernel"].startswith("multiply") and told["runs"] == "1"
    count = int(told["bundles"].replace(",", ""))
    micro = count / hardware.chip("v5e").clock * 1e6
    assert float(told["us"]) == pytest.approx(micro, rel=1e-3)
    assert told["bound"] == "bundles" and 0 < float(told["% of peak"]) < 100


def test_the_command_refuses_what_it_cannot_read(tmp_path, capsys):
    (tmp_path / "step.txt").write_text("nothing")
    assert main(["kernels", str(tmp_path / "step.txt"), "--chip", "H200"]) == 2
    assert "write one of v4, v5e" in capsys.readouterr().err
    assert main(["kernels", str(tmp_path / "step.txt"), "--chip", "v4"]) == 2
    assert "this is not HLO text" in capsys.readouterr().err

"""Reports of real programs, compiled for slices that are not there, against closed forms."""

import functools
import importlib.util
import json
import math
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import collective_matmul as cm
from collective_matmul.inspect import ReconciliationError, overlap_report

T, M, K, N = 8, 1024, 2048, 6144  # devices, rows of a shard, contracted, columns of a device
SHARD = M * K * 2  # bytes of bfloat16
FLOPS = 2 * T * M * K * N * T  # of all devices


@pytest.fixture(scope="module")
def tpus():
    """A mesh on a slice that is not there, as the TPU compiler describes it."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: no program was compiled for TPUs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
            patch.setenv(name, os.environ.get(name, "1"))
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
        yield cm.make_mesh(tensor=T, devices=devices)


def array(mesh, shape, *spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def gather_matmul(mesh, dtype=jnp.bfloat16, **names):
    function = functools.partial(cm.all_gather_matmul, axis_name="tensor", **names)
    specs = P("tensor"), P(None, "tensor")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[1])
    lhs = array(mesh, (T * M, K), *specs[0], dtype=dtype)
    rhs = array(mesh, (K, T * N), *specs[1], dtype=dtype)
    return jax.jit(mapped).lower(lhs, rhs).compile()


PLANS = {
    "ring": dict(algorithm="ring", backend="xla"),
    "two_way": dict(algorithm="two_way", backend="xla"),
    "unfused": dict(backend="unfused"),
}


@pytest.fixture(scope="module")
def reports(tpus):
    return {name: overlap_report(gather_matmul(tpus, **plan)) for name, plan in PLANS.items()}


@pytest.mark.parametrize("name", PLANS)
def test_what_is_found_equals_the_closed_forms(name, reports):
    report = reports[name]
    assert report.reconcile(flops=FLOPS, wire_bytes=(T - 1) * SHARD) is report
    assert report.flops == FLOPS // T
    assert report.wire_bytes == (T - 1) * SHARD
    assert {row.axes for row in report.collectives} == {"tensor"}
    assert (report.chip.name, report.partitions, report.uncosted) == ("v5e", T, ())


@pytest.mark.parametrize("name", PLANS)
def test_the_parts_add_up(name, reports):
    report = reports[name]
    parts = report.compute_seconds + report.exposed_seconds + report.copies_seconds
    assert report.seconds == pytest.approx(parts)
    assert report.exposed_seconds == pytest.approx(sum(r.exposed for r in report.collectives))
    for row in report.collectives:
        assert row.seconds == pytest.approx(row.exposed + row.hidden)
    assert report.compute_seconds == pytest.approx(sum(op.seconds for op in report.ops))
    assert report.compute_seconds > report.flops / report.chip.bf16
    arguments = SHARD + K * N * 2 + T * M * N * 2
    assert arguments <= report.hbm_peak < report.hbm_limit


def test_a_plain_gather_is_exposed_and_a_ring_is_hidden(reports):
    plain, ring, two_way = (reports[name] for name in ("unfused", "ring", "two_way"))
    assert plain.hidden_share == 0
    assert plain.collectives[0].kind == "all-gather"
    # 7 shards, over the two links into a device of the 2 x 4 slice at its corner
    wire = 7 / 2 * SHARD / plain.chip.link_bandwidth
    assert plain.exposed_seconds == pytest.approx(wire, rel=0.05)
    for report in (ring, two_way):
        assert [(r.kind, r.asynchronous, r.count) for r in report.collectives] == [
            ("collective-permute", True, T - 1)
        ]
        assert report.hidden_share > 0.9
        assert report.seconds < plain.seconds


def test_a_report_prints_itself(reports):
    lines = str(reports["two_way"]).splitlines()
    assert lines[0].startswith("predicted, not measured: one of 8 x v5e (data=1, fsdp=1, tensor=8)")
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("collective-permute") for line in lines)


def test_a_report_is_json(reports):
    told = json.loads(json.dumps(reports["ring"].as_dict()))
    assert told["chip"] == "v5e"
    assert told["collectives"][0]["count"] == T - 1
    assert told["seconds"] == reports["ring"].seconds


def test_a_mistake_is_named_with_both_numbers(reports):
    with pytest.raises(ReconciliationError, match=rf"holds {FLOPS:,}, and {2 * FLOPS:,} were"):
        reports["ring"].reconcile(flops=2 * FLOPS)
    with pytest.raises(ReconciliationError, match=rf"holds {7 * SHARD:,}, and {8 * SHARD:,} were"):
        reports["ring"].reconcile(wire_bytes=8 * SHARD)
    assert reports["ring"].reconcile(flops=1.004 * FLOPS)


def test_the_text_alone_tells_as_much_but_the_memory(tpus, reports):
    text = gather_matmul(tpus, **PLANS["ring"]).as_text()
    placed = overlap_report(text, mesh=tpus)
    assert placed.hbm_peak is None
    assert placed.seconds == pytest.approx(reports["ring"].seconds)
    guessed = overlap_report(text, chip="v5e")
    assert guessed.wire_bytes == placed.wire_bytes
    assert any("taken to be a ring" in remark for remark in guessed.remarks)
    with pytest.raises(ValueError, match="pass chip=, one of v4, v5e"):
        overlap_report(text)
    with pytest.raises(ValueError, match="runs on 8 devices, and the mesh has 4"):
        overlap_report(text, mesh=cm.make_mesh(tensor=4, devices=tpus.devices.flat[:4]))


def test_the_clock_scales_the_compute_alone(tpus, reports):
    slow = overlap_report(gather_matmul(tpus, **PLANS["unfused"]), clock=0.75e9)
    assert slow.compute_seconds == pytest.approx(2 * reports["unfused"].compute_seconds, rel=1e-3)
    assert slow.exposed_seconds == pytest.approx(reports["unfused"].exposed_seconds)


def test_a_layer_in_a_scan_counts_as_often_as_it_runs(tpus):
    """As `bench.flops` counts the jaxpr: the compiled loop holds the same products."""
    from bench.flops import count

    def layer(x, kernel):
        out = cm.all_gather_matmul(x, kernel, "tensor", algorithm="ring", backend="xla")
        return out.reshape(8, 256, 512).sum(0), None

    mapped = jax.shard_map(
        lambda x, kernels: jax.lax.scan(layer, x, kernels)[0],
        mesh=tpus,
        in_specs=(P("tensor"), P(None, None, "tensor")),
        out_specs=P("tensor"),
    )
    arguments = (
        array(tpus, (T * 256, 512), "tensor"),
        array(tpus, (5, 512, T * 512), None, None, "tensor"),
    )
    report = overlap_report(jax.jit(mapped).lower(*arguments).compile())
    report.reconcile(flops=count(mapped, *arguments).flops, wire_bytes=5 * 7 * 256 * 512 * 2)
    [loop] = report.timeline.loops
    assert loop.trips == 5


def test_a_cpu_tells_counts_and_no_time(tmp_path):
    mesh = cm.make_mesh(tensor=T, devices=jax.devices()[:T])
    program = gather_matmul(mesh, jnp.float32, **PLANS["ring"])
    report = overlap_report(program)
    assert not report.timed
    assert math.isnan(report.seconds)
    report.reconcile(flops=FLOPS, wire_bytes=(T - 1) * 2 * SHARD)
    assert any("no time can be told" in remark for remark in report.remarks)
    assert json.loads(json.dumps(report.as_dict()))["seconds"] is None
    assert "no time can be told" in str(report)
    with pytest.raises(ValueError, match="pass chip="):
        report.draw(tmp_path / "nothing.png")
    imagined = overlap_report(program, chip="v5e")
    assert imagined.timed
    assert any("lower bound" in remark for remark in imagined.remarks)


def test_what_is_not_scheduled_is_refused():
    lowered = jax.jit(jnp.sin).lower(jnp.ones(3))
    with pytest.raises(ValueError, match="the order of this text is no schedule"):
        overlap_report(lowered.as_text("hlo"), chip="v5e")


def test_a_program_whose_text_cannot_be_had_is_refused():
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("async-update instruction should have 1 operand")

    with pytest.raises(ValueError, match=r"a newer jaxlib, can \(async-update instruction"):
        overlap_report(Unreadable())


def test_a_picture_is_drawn(reports, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no picture was drawn")
    from matplotlib.image import imread

    reports["two_way"].draw(tmp_path / "timeline.png")
    picture = imread(tmp_path / "timeline.png")
    assert picture.shape[:2] == (500, 1400)
    colours = {tuple(round(255 * float(x)) for x in pixel[:3]) for row in picture for pixel in row}
    assert {(0x2B, 0x6C, 0xB0), (0xDD, 0x6B, 0x20)} <= colours  # products, permutes


def test_a_trace_opens_in_perfetto(reports, tmp_path):
    reports["two_way"].trace(tmp_path / "trace.json")
    told = json.loads((tmp_path / "trace.json").read_text())
    events = told["traceEvents"]
    threads = {
        e["tid"]: e["args"]["name"] for e in events if (e["ph"], e["name"]) == ("M", "thread_name")
    }
    assert {"compute", "tensor +", "tensor -"} <= set(threads.values())
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["tid"] for event in spans} <= set(threads)
    permutes = [e for e in spans if threads[e["tid"]].startswith("tensor")]
    assert len(permutes) == T - 1
    last = max(event["ts"] + event["dur"] for event in spans)
    assert last == pytest.approx(reports["two_way"].seconds * 1e6)
    assert all(event["dur"] > 0 and event["ts"] >= 0 for event in spans)


GPU = """HloModule jit_step, is_scheduled=true, num_partitions=8

ENTRY %main (x: bf16[4096,8192], w: bf16[8192,8192]) -> bf16[4096,8192] {
  %x = bf16[4096,8192]{1,0} parameter(0)
  %w = bf16[8192,8192]{1,0} parameter(1)
  %start = (bf16[4096,8192]{1,0}, bf16[32768,8192]{1,0}) all-gather-start(%x), channel_id=1, \
replica_groups=[1,8]<=[8], dimensions={0}, use_global_device_ids=true
  %gemm = (bf16[4096,8192]{1,0}, s8[33554432]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],\
"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %done = bf16[32768,8192]{1,0} all-gather-done(%start)
  %norm = bf16[4096,8192]{1,0} custom-call(%x), custom_call_target="__cudnn$norm"
  ROOT %out = bf16[4096,8192]{1,0} get-tuple-element(%gemm), index=0
}
"""


def test_a_gpu_is_costed_at_its_peak_and_what_is_unknown_is_listed():
    report = overlap_report(GPU, chip="H200")
    chip, flops, sent = report.chip, 2 * 4096 * 8192 * 8192, 7 * 4096 * 8192 * 2
    assert (report.flops, report.wire_bytes) == (flops, sent)
    assert report.compute_seconds == pytest.approx(flops / chip.bf16)
    wire = chip.permute_latency + 6 * chip.hop_latency + sent / chip.link_bandwidth
    assert report.exposed_seconds == pytest.approx(wire - report.compute_seconds)
    [row] = report.uncosted
    assert (row.what, row.count, row.shape) == ("custom-call __cudnn$norm", 1, "bf16[4096,8192]")
    text = str(report)
    assert "NOT COSTED" in text
    assert "__cudnn$norm" in text
    assert "lower bound" in text
    assert "one switch" in text


def test_a_program_on_one_device_has_no_communication():
    report = overlap_report(jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64))).compile())
    report.reconcile(flops=2 * 64**3, wire_bytes=0)
    assert (report.partitions, report.collectives, report.hidden_share) == (1, (), 1.0)
    assert "no collectives" in str(report)

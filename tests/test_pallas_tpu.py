"""The kernels for TPU: interpreted with a watch on races, and compiled for TPUs that are not here.

test_conformance has every form of product. Here a round is cut into panels and tiles, as on a small
chip, and a device has two cores.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

import collective_matmul as cm
from collective_matmul import algorithms, cost, duality, hardware
from collective_matmul.backends import pallas_tpu
from collective_matmul.backends.pallas_tpu import machine, tiles
from collective_matmul.inspect import overlap_report
from collective_matmul.inspect.remote import Lane, Schedule
from collective_matmul.operation import Plan

from .helpers import needs_compiler

SMALL = 12_000  # bytes on chip: a round of these products takes several panels and tiles
LARGE = 2**24


@pytest.fixture
def a_machine(monkeypatch):
    """Says what the kernels are to take the machine for: a_machine(cores, bytes on chip)."""

    def take(cores, vmem):
        interpret = pltpu.InterpretParams(num_cores_or_threads=cores, detect_races=True)
        made = machine.Machine(cores, vmem, 0, 1, interpret)
        monkeypatch.setattr(machine.Machine, "of", staticmethod(lambda chip: made))
        return made

    return take


def operands(t, groups=1, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(-4, 5, size=(groups, t * 16, t * 8)).astype(np.float32)
    w = rng.integers(-4, 5, size=(groups, t * 8, t * 16)).astype(np.float32)
    return x, w


def gather(x, w, **options):
    return cm.all_gather_matmul(x[0], w[0], "t", backend="pallas_tpu", **options)[None]


def scatter(x, w, **options):
    return cm.matmul_reduce_scatter(x[0], w[0], "t", backend="pallas_tpu", **options)[None]


FORMS = {
    "gather": (gather, (P("d", "t"), P("d", None, "t")), P("d", None, "t")),
    "scatter": (scatter, (P("d", None, "t"), P("d", "t")), P("d", "t")),
}


def check(mesh, form, algorithm):
    """Against numpy, bit for bit, without a race."""
    function, inside, outside = FORMS[form]
    x, w = operands(mesh.shape["t"], mesh.shape["d"])
    run = functools.partial(function, algorithm=algorithm)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=inside, out_specs=outside)
    np.testing.assert_array_equal(jax.jit(mapped)(x, w), x @ w)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("algorithm", algorithms.names())
def test_panels_and_tiles_without_races(a_machine, mesh_of, algorithm, form):
    a_machine(1, SMALL)
    check(mesh_of(2, 3, names=("d", "t")), form, algorithm)  # the kernel's axis is one of two


@pytest.mark.parametrize("vmem", [SMALL, LARGE])
@pytest.mark.parametrize("form", FORMS)
def test_two_cores_without_races(a_machine, mesh_of, form, vmem):
    a_machine(2, vmem)
    check(mesh_of(1, 2, names=("d", "t")), form, "two_way")


@pytest.mark.parametrize("cores", [1, 2])
def test_sums_share_semaphores_where_there_are_too_few(a_machine, mesh_of, monkeypatch, cores):
    """Two for each lane and round, where a round has more tiles."""
    mesh = mesh_of(1, 4, names=("d", "t"))
    made = a_machine(cores, SMALL)
    monkeypatch.setattr(tiles, "SIGNALS", 2 * 2 * 2 + 1)  # two_way: two lanes, two rounds
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 32), (32, 64)))
    op = cm.explain("mk,kn->mn", x, w, axis_size=4, scatter="m").op
    cut = pallas_tpu.arranged(op, algorithms.lanes("two_way", 4), made)
    pieces = cut.ring.blocks * cut.tiles.count
    assert pieces / 2 <= tiles.together(cut.ring, cut.tiles.count) < pieces
    check(mesh, "scatter", "two_way")
    monkeypatch.setattr(tiles, "SIGNALS", 2 * 2 * 2 - 1)
    refused = pallas_tpu.arranged(op, algorithms.lanes("two_way", 4), made)
    assert "need more semaphores than the 7 there are" in refused


def test_small_machines_cut_products():
    """What the tests above rely on."""
    lanes, ops = algorithms.lanes("two_way", 3), {}
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    w = jax.ShapeDtypeStruct((32, 16), jnp.float32)
    ops["gather"] = cm.explain("mk,kn->mn", x, w, axis_size=3, gather_lhs="m").op
    whole = jax.ShapeDtypeStruct((48, 32), jnp.float32)
    wide = jax.ShapeDtypeStruct((32, 48), jnp.float32)
    ops["scatter"] = cm.explain("mk,kn->mn", whole, wide, axis_size=3, scatter="m").op
    for kind, op in ops.items():
        small = pallas_tpu.arranged(op, lanes, machine.Machine(1, SMALL, 0, 1, True))
        large = pallas_tpu.arranged(op, lanes, machine.Machine(1, LARGE, 0, 1, True))
        assert large.ring.blocks == 1, kind
        assert small.ring.blocks * small.tiles.count > large.ring.blocks * large.tiles.count, kind


def check_gradients(mesh, form, **options):
    """Against numpy, bit for bit; returns the jaxpr."""
    function, inside, outside = FORMS[form]
    t = mesh.shape["t"]
    x, w = operands(t)
    dy = np.random.default_rng(1).integers(-4, 5, size=(1, 16 * t, 16 * t)).astype(np.float32)
    run = functools.partial(function, **options)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=inside, out_specs=outside)
    back = jax.jit(lambda x, w: jax.vjp(mapped, x, w)[1](dy))
    dx, dw = back(x, w)
    np.testing.assert_array_equal(dx, dy @ w.transpose(0, 2, 1))
    np.testing.assert_array_equal(dw, x.transpose(0, 2, 1) @ dy)
    return str(jax.make_jaxpr(back)(x, w))


@pytest.mark.parametrize("form", FORMS)
def test_gradients(mesh_of, form):
    """Both are kernels again; what contracts the moved letter follows its kernel."""
    check_gradients(mesh_of(1, 2, names=("d", "t")), form, algorithm="two_way")


def by_plans(mesh, monkeypatch, scatter, gather):
    """The gradients of a gather, by these plans."""
    plans = {"gather": gather, "scatter": scatter}
    monkeypatch.setattr(duality, "choose", lambda op: plans[op.kind])
    return check_gradients(mesh, "gather")


def test_a_gradient_s_gather_beside_a_kernel(mesh_of, monkeypatch):
    """Independent permutes under the kernel of the scatter."""
    scatter = Plan("pallas_tpu", "two_way", algorithms.lanes("two_way", 2))
    gather = Plan("xla", "direct", algorithms.lanes("direct", 2), fat=True, held=True)
    text = by_plans(mesh_of(1, 2, names=("d", "t")), monkeypatch, scatter, gather)
    assert text.count("pallas_call") == 1
    assert text.rindex("optimization_barrier") > text.rindex("pallas_call")


@pytest.mark.parametrize(("algorithm", "cores"), [("two_way", 1), ("bidirectional", 2)])
def test_a_gradient_s_gather_within_a_kernel(a_machine, mesh_of, monkeypatch, algorithm, cores):
    """The scatter's kernel carries it: one kernel for both gradients, without a race."""
    a_machine(cores, SMALL)
    lanes = algorithms.lanes(algorithm, 3)
    scatter = Plan("pallas_tpu", algorithm, lanes)
    gather = Plan("pallas_tpu", algorithm, lanes, fat=True, held=True)
    text = by_plans(mesh_of(1, 3, names=("d", "t")), monkeypatch, scatter, gather)
    assert text.count("pallas_call") == 2  # and the forward pass, which is not needed
    assert not interpret_pallas_call.races.races_found


def test_bare_collectives(mesh_of):
    mesh, rng = mesh_of(3), np.random.default_rng(2)
    x = rng.integers(-8, 9, size=(3, 2, 3)).astype(np.float32)
    options = {"backend": "pallas_tpu", "algorithm": "bidirectional"}

    def whole(x):
        return cm.all_gather(x[0], "t", dim=1, **options)[None]

    def shard(x):
        return cm.reduce_scatter(x[0], "t", dim=1, **options)[None]

    for body, want in (
        (whole, np.stack([np.concatenate(list(x), axis=1)] * 3)),
        (shard, np.stack(np.split(x.sum(0), 3, axis=1))),
    ):
        mapped = jax.shard_map(body, mesh=mesh, in_specs=P("t"), out_specs=P("t"))
        np.testing.assert_array_equal(jax.jit(mapped)(x), want)


def refusal(
    chip="v6e", algorithm="two_way", t=4, shape=(512, 6144, 2688), dtype=jnp.bfloat16, **options
):
    m, k, n = shape
    lhs, rhs = jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((k, n), dtype)
    told = cm.explain("mk,kn->mn", lhs, rhs, axis_size=t, chip="cpu", gather_lhs="m", **options)
    return pallas_tpu.unsupported(told.op, algorithms.lanes(algorithm, t), hardware.chip(chip))


def test_what_a_chip_cannot_run_is_refused_with_the_numbers():
    assert refusal() is None
    assert "no multiples of 16" in refusal(shape=(520, 6144, 2688), algorithm="bidirectional")
    assert "6100 columns are not a multiple of 128" in refusal(shape=(512, 6100, 2688))
    assert "not int8" in refusal(dtype=jnp.int8)
    assert "not float16" in refusal(preferred_element_type=jnp.float16, dtype=jnp.float16)
    assert "precision" in refusal(precision="highest")
    assert "MiB on chip, of 13.8" in refusal("v4", shape=(512, 61440, 2688), algorithm="direct")
    assert "name it" in refusal("cpu")


def test_axes_that_are_not_manual_are_refused(mesh_of):
    mesh, x = mesh_of(2, 2, names=("d", "t")), jnp.ones((8, 8))

    def body(x):
        return cm.all_gather(x, "t", dim=0, backend="pallas_tpu")

    with pytest.raises(NotImplementedError, match="not manual here"):
        jax.shard_map(body, mesh=mesh, in_specs=P("t"), out_specs=P("t"), axis_names={"t"})(x)
    with pytest.raises(NotImplementedError, match=r"jax\.vmap"):
        jax.vmap(body, axis_name="t")(jnp.ones((2, 8, 8)))
    with pytest.raises(NotImplementedError, match="8 bytes"):
        jax.shard_map(body, mesh=mesh, in_specs=P("t"), out_specs=P("t"))(x.astype(complex))


def chosen(chip, tokens=2048, t=16, stepwise=False, **options):
    lhs = jax.ShapeDtypeStruct((tokens // t, 6144), jnp.bfloat16)
    rhs = jax.ShapeDtypeStruct((6144, 43008 // t), jnp.bfloat16)
    told = cm.explain("mk,kn->mn", lhs, rhs, axis_size=t, chip=chip, gather_lhs="m", **options)
    if stepwise:
        return cost.ranked(told.op, hardware.chip(chip), stepwise=True)[0].plan.backend
    return told.chosen.plan.backend


def test_it_is_chosen_where_it_promises_to_be_faster():
    """128 rows a chunk: compiled, 1.3 times as fast as the next best way on v4, 1.2 on v6e; 4,096
    rows: 1.05 times on v4, 1.4 on v6e. On 7x links are all the time, and permutes as fast."""
    assert chosen("v4") == chosen("v6e") == "pallas_tpu"
    assert chosen("v4", tokens=16384, t=4) == chosen("v6e", tokens=16384, t=4) == "pallas_tpu"
    assert chosen("7x", tokens=16384) == "xla"
    assert chosen("v4", stepwise=True) != "pallas_tpu"  # it has no place to put hops beside
    assert chosen("cpu") != "pallas_tpu"
    assert chosen("cpu", backend="pallas_tpu") == "pallas_tpu"


def test_a_schedule_is_played_as_the_kernel_runs():
    """Two lanes of two and one hops, one panel of two tiles."""
    lanes = (Lane(1, 2, 100), Lane(-1, 1, 100))
    steps = list(Schedule("gather", ("t",), lanes, 2).steps())
    hops = [what if step == "work" else (step, what[:2]) for step, what in steps]
    sixth = pytest.approx(1 / 6)
    assert hops == [
        *(("send", (0, 1)), ("send", (1, 1)), sixth),
        *(("wait", (0, 1)), ("wait", (1, 1)), ("send", (0, 2)), sixth, sixth),
        *(("wait", (0, 2)), sixth, sixth, sixth),
    ]
    half, one = pytest.approx(1 / 12), (0, 1, 0)
    scatter = Schedule("scatter", ("t",), lanes, 2)
    steps = list(scatter.steps())
    assert scatter.pieces == 2
    assert steps[:4] == [("work", sixth), ("send", (0, 2, 0)), ("work", sixth), ("send", (0, 2, 1))]
    assert steps[4:6] == [("wait", (0, 2, 0)), ("work", sixth)]
    assert steps[-3:] == [("wait", (0, 1, 1)), ("wait", (1, 1, 1)), ("work", sixth)]
    shared = list(Schedule("scatter", ("t",), lanes, 4, together=2).steps())
    assert shared[8:12] == [("wait", (0, 2, 0)), ("wait", (0, 2, 1)), ("work", half), ("send", one)]
    carrying = dataclasses.replace(scatter, carried=(Lane(1, 2, 100),))
    third, carried = [x for x in carrying.steps() if x[1] in ((2, 1, 0), (2, 2, 0))], list(steps)
    assert [what for what, _ in third] == ["send", "wait", "send", "wait"]
    assert [x for x in carrying.steps() if x not in third] == carried
    sent = {what for step, what in steps if step == "send"}
    assert sent == {what for step, what in steps if step == "wait"}


@needs_compiler
@pytest.mark.parametrize("mode", ["gather", "scatter"])
@pytest.mark.parametrize("where", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_it_compiles_for_real_chips(where, mode):
    """With check_vma, on one core and on two; what it exposes is told, and the rest is hidden."""
    from bench.predicted.operations import Product
    from bench.predicted.slices import compile_only, tpu_slice

    compile_only()
    mesh = cm.make_mesh(data=1, tensor=4, devices=tpu_slice(where))
    product = Product(mode, 1024, 1024, 1024)
    compiled = product.program(mesh, "two_way", "pallas_tpu").traced.lower().compile()
    report = overlap_report(compiled, mesh=mesh)
    (row,) = report.collectives
    rounds = {"gather": 3, "scatter": 3 * 4}  # hops, or pieces of them
    assert (row.kind, row.axes, row.asynchronous) == ("collective-permute", "tensor", True)
    assert row.count == rounds[mode]
    assert row.wire_bytes == 3 * 256 * 1024 * 2
    assert row.hidden > 0
    (kernel,) = (op for op in report.ops if op.opcode == "custom-call")
    assert kernel.flops >= 2 * 1024**3


@needs_compiler
@pytest.mark.parametrize(
    ("where", "tensor", "sizes"),
    [
        ("v4:2x2x2", 8, (2048, 3840, 6144)),
        ("v5p:2x2x1", 4, (2048, 7680, 6144)),
        ("v4:2x2x2", 8, (16384, 3840, 6144)),
    ],
)
def test_scatters_fit_on_the_chip(where, tensor, sizes):
    """Tiles as large as the arrays alone allow need 16.7 of v4's 16 MiB, and 66.8 of v5p's 64, for
    rows are spilled. The third's sums come in 1,536 tiles, which share 384 semaphores."""
    from bench.predicted.operations import Product
    from bench.predicted.slices import compile_only, tpu_slice

    compile_only()
    mesh = cm.make_mesh(data=1, tensor=tensor, devices=tpu_slice(where))
    program = Product("scatter", *sizes).program(mesh, "two_way", "pallas_tpu")
    assert program.traced.lower().compile().memory_analysis()


def test_dtypes_of_a_machine_are_those_of_the_table():
    for name in ("v4", "v5e", "v5p", "v6e", "7x"):
        made = machine.Machine.of(hardware.chip(name))
        assert not made.interpret
        assert made.cores == (2 if name in ("v4", "v5p") else 1)
        assert made.vmem < hardware.chip(name).vmem
    assert machine.Machine.of(hardware.chip("cpu")).interpret
    assert dataclasses.replace(made, cores=3).cores == 3

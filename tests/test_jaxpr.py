"""What the primitive traces to: permutes and products, as many as the schedule says, no more."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import collective_matmul as cm
from collective_matmul import algorithms

from .helpers import Case, collectives, equations, lanes_plans, mapped, named, permutes, plan_id

GATHER = Case("mk,kn->mn", "gather_lhs", "m", dict(m=4, k=3, n=5))
CONTRACTING = Case("mk,kn->mn", "gather_lhs", "k", dict(m=4, k=2, n=5))
WEIGHTS = Case("mk,kn->mn", "gather_rhs", "k", dict(m=4, k=2, n=5))
MANY = Case(
    ("mk,kn->mn", "mk,kj->mj"), "gather_lhs", "m", dict(m=4, k=3, n=5, j=7), tuples=(False, True)
)
SCATTER = Case("mk,kn->mn", "scatter", "m", dict(m=4, k=3, n=5))
SUM = Case(
    ("mk,kn->mn", "mj,jn->mn"), "scatter", "n", dict(m=3, k=3, n=4, j=7), tuples=(True, True)
)
CASES = [GATHER, CONTRACTING, WEIGHTS, MANY, SCATTER, SUM]


def loss(function):
    return lambda operands: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(function(operands)))


def orders(function):
    """The function, its gradient, and the gradient of that."""
    first = jax.grad(loss(function))
    second = jax.grad(loss(first))
    return {"forward": function, "gradient": first, "second gradient": second}


@pytest.mark.parametrize("t", [2, 5])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("plan", lanes_plans(), ids=plan_id)
def test_no_plain_collective_is_left(plan, case, t, mesh_of):
    function = mapped(mesh_of(t), ("t",), [case], *plan)
    for name, order in orders(function).items():
        found = named(order, [case.operands(t)])
        assert permutes(found), name
        assert not collectives(found), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_walk_finds_plain_collectives_where_there_are_any(case, mesh_of):
    function = mapped(mesh_of(2), ("t",), [case], "unfused", None)
    for name, order in orders(function).items():
        assert collectives(named(order, [case.operands(2)])), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_device_sends_nothing(case, mesh_of):
    for plan in lanes_plans():
        function = mapped(mesh_of(1), ("t",), [case], *plan)
        for order in orders(function).values():
            found = named(order, [case.operands(1)])
            assert not permutes(found)
            assert not collectives(found)


def pull(function, operands):
    """The gradient of every result with a cotangent of its own, in one jaxpr with the function."""
    out = jax.eval_shape(function, operands)
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), out)
    return named(lambda x, y: jax.vjp(function, x)[1](y), operands, ones)


def hops(algorithm, t, shard):
    """Messages that a schedule sends, those of no rows left out."""
    lanes = algorithms.lanes(algorithm, t)
    return sum(lane.hops for lane in lanes if np.diff(lane.part.bounds(shard)) > 0)


@pytest.mark.parametrize("t", [2, 3, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("plan", lanes_plans(), ids=plan_id)
def test_as_many_permutes_as_the_schedule_has(plan, case, t, mesh_of):
    """A gather's gradient is a scatter and a gather; a scatter's is one gather, whose cotangent
    travels once for all operands."""
    function, operands = mapped(mesh_of(t), ("t",), [case], *plan), [case.operands(t)]
    once = hops(plan[1], t, case.sizes[case.letter])
    assert len(permutes(named(function, operands))) == once
    backward = len(permutes(pull(function, operands))) - once
    assert backward == (once if case.mode == "scatter" else 2 * once)


@pytest.mark.parametrize("plan", lanes_plans(), ids=plan_id)
def test_an_empty_half_is_not_sent(plan, mesh_of):
    case = Case("mk,kn->mn", "scatter", "m", dict(m=1, k=3, n=5))
    found = named(mapped(mesh_of(4), ("t",), [case], *plan), [case.operands(4)])
    assert len(permutes(found)) == hops(plan[1], 4, 1)
    assert all(math.prod(x.invars[0].aval.shape) > 0 for x in permutes(found))


def sent(found):
    avals = [equation.invars[0].aval for equation in permutes(found)]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in avals)


@pytest.mark.parametrize("t", [2, 5, 6])
@pytest.mark.parametrize("plan", lanes_plans(), ids=plan_id)
def test_bytes_on_the_wire(plan, t, mesh_of):
    """t - 1 shards for each device, whatever the way: of the operand, or of the result."""
    for case, shard in (
        (GATHER, 4 * 3), (CONTRACTING, 4 * 2), (WEIGHTS, 2 * 5), (MANY, 4 * 3),
        (SCATTER, 4 * 5), (SUM, 3 * 4),
    ):  # fmt: skip
        found = named(mapped(mesh_of(t), ("t",), [case], *plan), [case.operands(t)])
        assert sent(found) == (t - 1) * shard * 4, str(case)


@pytest.mark.parametrize("plan", lanes_plans(), ids=plan_id)
def test_the_wire_dtype_is_what_travels(plan, mesh_of):
    """Of partial sums, here and in the gradient. An operand travels as it is."""

    def dtypes(found):
        return {str(equation.invars[0].aval.dtype) for equation in permutes(found)}

    for options, sums in (
        ({}, "bfloat16"),
        ({"wire_dtype": "float32"}, "float32"),
        ({"preferred_element_type": "float32"}, "float32"),
        ({"preferred_element_type": "float32", "wire_dtype": "bfloat16"}, "bfloat16"),
    ):
        sizes = dict(m=4, k=3, n=5)
        scatter = Case("mk,kn->mn", "scatter", "m", sizes, "bfloat16", options=options)
        gather = Case("mk,kn->mn", "gather_lhs", "m", sizes, "bfloat16", options=options)
        run = [mapped(mesh_of(3), ("t",), [case], *plan) for case in (scatter, gather)]
        assert dtypes(named(run[0], [scatter.operands(3)])) == {sums}
        assert dtypes(named(run[1], [gather.operands(3)])) == {"bfloat16"}
        # The gather's gradient sums into a bfloat16 operand, whatever the result's dtype was.
        wire = options.get("wire_dtype", "bfloat16")
        assert dtypes(pull(run[1], [gather.operands(3)])) == {"bfloat16", wire}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("plan", lanes_plans(), ids=plan_id)
def test_residuals_are_shards(plan, case, mesh_of):
    """What is kept for the gradient is the operands as they were given, nothing gathered."""
    t, kept = 4, []

    def body(operands):
        lhs, rhs = jax.tree.map(lambda x: x[0], operands)
        _, back = jax.vjp(
            lambda lhs, rhs: case.call(lhs, rhs, "t", backend=plan[0], algorithm=plan[1]), lhs, rhs
        )
        kept.extend(jax.tree.leaves(back))
        return jax.tree.map(lambda x: x[None], operands)

    operands = case.operands(t)
    jax.make_jaxpr(jax.shard_map(body, mesh=mesh_of(t), in_specs=P("t"), out_specs=P("t")))(
        operands
    )
    given = sorted(x.shape[1:] for x in jax.tree.leaves(operands))
    held = sorted(x.shape for x in kept if x.ndim)
    assert held
    assert set(held) <= set(given)
    assert sum(map(math.prod, held)) <= sum(map(math.prod, given))


def products(found):
    return len(found.get("dot_general", ()))


@pytest.mark.parametrize("plan", lanes_plans(), ids=plan_id)
def test_a_product_for_every_piece(plan, mesh_of):
    """Each shard's part is multiplied once as it arrives, and this device's own shard once."""
    t = 6
    cut = max((lane.part.count for lane in algorithms.lanes(plan[1], t)), default=1)
    pieces = cut * (t - 1)
    found = named(mapped(mesh_of(t), ("t",), [GATHER], *plan), [GATHER.operands(t)])
    assert pieces + 1 <= products(found) <= pieces + cut


def weight_gradient(rows, mesh, algorithm, k=6144, n=24576):
    """The gradient of an all-gather matmul at [rows, k] . [k, n] over 8 devices; which is fat."""
    run = jax.shard_map(
        functools.partial(cm.all_gather_matmul, axis_name="t", backend="xla", algorithm=algorithm),
        mesh=mesh, in_specs=(P("t"), P(None, "t")), out_specs=P(None, "t"),
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((rows, k), "bfloat16")
    w = jax.ShapeDtypeStruct((k, n), "bfloat16")
    y = jax.ShapeDtypeStruct((rows, n), "bfloat16")
    found = named(lambda x, w, y: jax.vjp(run, x, w)[1](y), x, w, y)
    local = (
        jax.ShapeDtypeStruct((rows // 8, k), x.dtype),
        jax.ShapeDtypeStruct((k, n // 8), x.dtype),
    )
    later = cm.explain("mk,kn->mn", *local, axis_size=8, gather_lhs="m", backend="xla",
                       algorithm=algorithm).backward  # fmt: skip
    return found, [x.chosen.plan.fat for x in later]


@pytest.mark.parametrize("rows", [8, 64, 8192, 65536])
@pytest.mark.parametrize("algorithm", ["ring", "two_way", "direct"])
def test_a_weight_gradient_is_one_fat_product_where_chosen(algorithm, rows, mesh_of):
    found, fat = weight_gradient(rows, mesh_of(8), algorithm)
    forward, d_rows, d_weights = 8, 8, 1 if fat[1] else 8
    assert products(found) == forward + d_rows + d_weights
    # What it contracts is put together as it arrives, not transposed on the way.
    laid = [x.params["layout"].major_to_minor for x in found.get("layout_constraint", [])]
    assert laid == [(0, 1)] * sum(fat)


def test_large_weight_gradients_are_fat(mesh_of):
    """8192 x 6144 x 24576 over 8: eight passes over a [6144, 3072] accumulator cost more."""
    _, fat = weight_gradient(8192, mesh_of(8), "two_way")
    assert fat == [False, True]


@pytest.mark.parametrize("order", ["mn", "nm"])
@pytest.mark.parametrize("mode", ["gather_lhs", "gather_rhs", "scatter"])
def test_each_operand_keeps_its_precision(mode, order, mesh_of):
    """Whichever the backend writes first: that of lhs, which has the letter m, is the high one."""
    letter = {"gather_lhs": "m", "gather_rhs": "n", "scatter": "m"}[mode]
    case = Case(f"mk,kn->{order}", mode, letter, dict(m=7, k=3, n=11),
                options={"precision": ("highest", "default")})  # fmt: skip
    for plan in (("unfused", None), ("xla", "ring")):
        found = named(mapped(mesh_of(2), ("t",), [case], *plan), [case.operands(2)])
        for equation in found["dot_general"]:
            for operand, precision in zip(
                equation.invars, equation.params["precision"], strict=True
            ):
                of_lhs = bool({7, 14} & set(operand.aval.shape))
                assert (precision == jax.lax.Precision.HIGHEST) == of_lhs


@pytest.mark.parametrize("plan", lanes_plans(), ids=plan_id)
def test_bare_collectives_are_permutes_alone(plan, mesh_of):
    options = dict(zip(("backend", "algorithm"), plan, strict=True))
    x = np.ones((12, 6), np.float32)
    for collective in (cm.all_gather, cm.reduce_scatter):
        run = jax.shard_map(
            functools.partial(collective, axis_name="t", dim=1, **options),
            mesh=mesh_of(3), in_specs=P("t"), out_specs=P("t"),
        )  # fmt: skip
        once = hops(plan[1], 3, 6 if collective is cm.all_gather else 2)
        found = named(run, x)
        assert len(permutes(found)) == once
        assert not collectives(found)
        assert not products(found)
        back = named(jax.grad(lambda x, run=run: jnp.sum(run(x) ** 2)), x)
        assert not collectives(back)
        assert len(permutes(back)) == 2 * once


def test_no_memory_is_zeroed_for_what_is_gathered(mesh_of):
    """A buffer of zeros would be written once for nothing; every row of it is overwritten."""
    function = mapped(mesh_of(4), ("t",), [GATHER], "xla", "ring")
    whole = (16, 5)
    for equation in equations(jax.make_jaxpr(function)([GATHER.operands(4)])):
        if equation.primitive.name == "broadcast_in_dim":
            assert equation.outvars[0].aval.shape != whole


def test_an_operand_kept_whole_has_its_gradient_summed_once(mesh_of):
    """Weights that all devices of the axis share: the sum of their gradients is the caller's
    doing (jax transposes the sharing), one psum of the weights' size, and no other."""
    run = jax.shard_map(
        lambda x, w: cm.matmul_reduce_scatter(x, w, "t", backend="xla", algorithm="ring"),
        mesh=mesh_of(4), in_specs=(P(None, "t"), P()), out_specs=P("t"),
    )  # fmt: skip
    x, w = np.ones((8, 12), np.float32), np.ones((3, 5), np.float32)
    found = named(jax.grad(lambda x, w: jnp.sum(run(x, w) ** 2), (0, 1)), x, w)
    sums = [equation for name in collectives(found) for equation in found[name]]
    assert len(sums) == 1
    assert sums[0].invars[0].aval.shape == (3, 5)

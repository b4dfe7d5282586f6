"""Derivatives against those of plain einsums on one device: first, second, and by differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import collective_matmul as cm

from .helpers import Case, lanes_plans, mapped, plan_id, plans, quick

CASES = [
    Case("mk,kn->mn", "gather_lhs", "m", dict(m=3, k=2, n=4), "float64"),
    Case("mk,kn->mn", "gather_lhs", "k", dict(m=3, k=3, n=4), "float64"),
    Case("bmk,bkn->nbm", "gather_lhs", "b", dict(b=1, m=2, k=3, n=2), "float64"),
    Case("mk,kn->mn", "gather_rhs", "k", dict(m=2, k=3, n=4), "float64"),
    Case("mk,kn->mn", "gather_rhs", "n", dict(m=2, k=3, n=3), "float64"),
    Case(
        ("bsd,dfg->bsfg", "bsd,dj->bsj", "bsd,bsn->dn"), "gather_lhs", "s",
        dict(b=2, s=3, d=2, f=2, g=2, j=3, n=2), "float64", (False, True),
    ),
    Case(
        ("mk,kn->mn", "jk,kn->nj"), "gather_rhs", "k", dict(m=2, k=3, n=4, j=3), "float64",
        (True, False),
    ),
    Case("mk,kn->mn", "scatter", "m", dict(m=3, k=2, n=4), "float64"),
    Case("bmk,bkn->bmn", "scatter", "b", dict(b=3, m=2, k=3, n=2), "float64"),
    Case("mk,kn->nm", "scatter", "n", dict(m=2, k=3, n=1), "float64"),
    Case(
        ("mk,kn->mn", "mj,jn->mn"), "scatter", "n", dict(m=2, k=2, j=3, n=3), "float64",
        (True, True),
    ),
    Case(("mk,kn->mn", "mk,nk->mn"), "scatter", "m", dict(m=3, k=2, n=4), "float64", (False, True)),
]  # fmt: skip


def plain(cases, t):
    """As `mapped`, by einsums on one device."""

    def function(operands):
        return {
            str(case): case.on_one_device(jnp, lhs, rhs, t)
            for case, (lhs, rhs) in zip(cases, operands, strict=True)
        }

    return function


def loss(function):
    """Of all cases together, and with derivatives of every order."""
    return lambda operands: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(function(operands)))


def first(function):
    return jax.grad(loss(function))


def second(function):
    """The product of the Hessian with a direction, in reverse over reverse."""

    def along(operands):
        grads = jax.tree.leaves(first(function)(operands))
        ways = [jnp.cos(1.0 + jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in grads]
        return sum(jnp.vdot(x, way) for x, way in zip(grads, ways, strict=True))

    return jax.grad(along)


def compiled(derivative, operands):
    return jax.jit(derivative).lower(operands).compile(compiler_options=quick())(operands)


def operands_of(cases, t):
    return jax.tree.map(lambda x: 0.3 * x, [case.operands(t) for case in cases])


@functools.cache
def wanted(order, t):
    return compiled(order(plain(CASES, t)), operands_of(CASES, t))


def compare(got, want):
    wrong = []
    for case, ours, theirs in zip(CASES, got, want, strict=True):
        for side, a, b in zip(("lhs", "rhs"), ours, theirs, strict=True):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                if not np.allclose(x, y, rtol=1e-11, atol=1e-11):
                    wrong.append(f"{case}: {side}[{i}] is off by {np.abs(x - y).max():.2g}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("t", [1, 2, 4])  # and 3 below
@pytest.mark.parametrize("plan", plans(), ids=plan_id)
def test_gradients(plan, t, mesh_of, x64):
    try:
        got = compiled(first(mapped(mesh_of(t), ("t",), CASES, *plan)), operands_of(CASES, t))
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    compare(got, wanted(first, t))


@pytest.mark.parametrize("t", [3])
@pytest.mark.parametrize("plan", plans(), ids=plan_id)
def test_gradients_of_gradients(plan, t, mesh_of, x64):
    try:
        got = compiled(second(mapped(mesh_of(t), ("t",), CASES, *plan)), operands_of(CASES, t))
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    compare(got, wanted(second, t))


@pytest.mark.parametrize("plan", plans(), ids=plan_id)
def test_numerical_derivatives_agree(plan, mesh_of, x64):
    """First and second ones, by jax's own check."""
    cases = [CASES[0], CASES[7]]
    function = mapped(mesh_of(2), ("t",), cases, *plan)
    check_grads(jax.jit(function), (operands_of(cases, 2),), order=2, modes=["rev"])


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("plan", plans(), ids=plan_id)
def test_the_bare_collectives_are_each_others_gradient(plan, dim, mesh_of, x64):
    t, options = 3, dict(zip(("backend", "algorithm"), plan, strict=True))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(t, 2, 3, 5)), rng.normal(size=(t, 6, 9, 15))

    def gather(x):
        return cm.all_gather(x[0], "t", dim=dim, **options)[None]

    def scatter(y):
        return cm.reduce_scatter(y[0], "t", dim=dim, **options)[None]

    gather, scatter = (
        jax.jit(jax.shard_map(f, mesh=mesh_of(t), in_specs=P("t"), out_specs=P("t")))
        for f in (gather, scatter)
    )
    whole, pull = jax.vjp(gather, x)
    np.testing.assert_array_equal(whole, np.stack([np.concatenate(list(x), dim)] * t))
    y = y[tuple(slice(0, size) for size in whole.shape)]
    shard, push = jax.vjp(scatter, y)
    np.testing.assert_allclose(shard, np.stack(np.split(y.sum(0), t, axis=dim)), rtol=1e-12)
    np.testing.assert_allclose(pull(jnp.asarray(y))[0], shard, rtol=1e-12)
    np.testing.assert_array_equal(push(jnp.asarray(x))[0], whole)
    cubes = jax.grad(lambda x: jnp.sum(gather(x) ** 3 / 3))  # every device has every shard
    np.testing.assert_allclose(cubes(x), t * x**2, rtol=1e-12)
    slopes = jax.grad(lambda x: jnp.sum(jnp.sin(cubes(x))))
    np.testing.assert_allclose(slopes(x), 2 * t * x * np.cos(t * x**2), rtol=1e-10)


@pytest.mark.parametrize("plan", lanes_plans(), ids=plan_id)
@pytest.mark.parametrize("mode", ["gather_lhs", "scatter"])
def test_narrow_operands_have_narrow_gradients(plan, mode, mesh_of):
    """Of the operands' dtype, whatever the result's is."""
    t = 4
    for preferred in (None, "float32"):
        case = Case("mk,kn->mn", mode, "m", dict(m=2, k=3, n=4), "bfloat16",
                    options={"preferred_element_type": preferred})  # fmt: skip
        operands = [case.operands(t)]
        ours, theirs = (
            compiled(
                jax.grad(
                    lambda x, f=f: sum(jnp.sum(y.astype("float32")) for y in jax.tree.leaves(f(x)))
                ),
                operands,
            )
            for f in (mapped(mesh_of(t), ("t",), [case], *plan), plain([case], t))
        )
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert x.dtype == jnp.bfloat16
            np.testing.assert_array_equal(x, y)  # small integers: exact


@pytest.mark.parametrize("plan", lanes_plans(), ids=plan_id)
def test_complex_operands(plan, mesh_of):
    t = 3
    rng = np.random.default_rng(1)
    x, w = (
        (rng.normal(size=s) + 1j * rng.normal(size=s)).astype("complex64") for s in ((6, 4), (4, 6))
    )
    run = jax.shard_map(
        lambda x, w: cm.all_gather_matmul(x, w, "t", backend=plan[0], algorithm=plan[1]),
        mesh=mesh_of(t), in_specs=(P("t"), P(None, "t")), out_specs=P(None, "t"),
    )  # fmt: skip
    (y, pull), (z, push) = jax.vjp(jax.jit(run), x, w), jax.vjp(jnp.matmul, x, w)
    np.testing.assert_allclose(y, z, rtol=1e-5)
    for a, b in zip(pull(1j * y), push(1j * z), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)


def gather_product(mesh, **options):
    return jax.shard_map(
        functools.partial(cm.all_gather_matmul, axis_name="t", **options),
        mesh=mesh, in_specs=(P("t"), P(None, "t")), out_specs=P(None, "t"),
    )  # fmt: skip


def test_forward_mode_is_refused_in_words(mesh_of):
    x, w = jnp.ones((4, 3)), jnp.ones((3, 4))
    run = jax.jit(gather_product(mesh_of(2), backend="xla"))
    for forward in (
        lambda: jax.jvp(run, (x, w), (x, w)),
        lambda: jax.jvp(lambda x: run(x, w), (x,), (x,)),
        lambda: jax.jacfwd(run)(x, w),
    ):
        with pytest.raises(TypeError, match="forward-mode autodiff"):
            forward()


def test_forward_mode_without_jit_is_refused_too(mesh_of):
    """In words of jax's own, which without jit are the same for any rule inside shard_map."""
    x, w = jnp.ones((4, 3)), jnp.ones((3, 4))
    run = gather_product(mesh_of(2), backend="xla")
    with pytest.raises(TypeError):
        jax.jvp(run, (x, w), (x, w))


def test_what_is_not_differentiated_may_be_forward(mesh_of):
    """A product of constants inside a function that jvp differentiates is no concern of jvp."""
    x, w = jnp.ones((4, 3)), jnp.ones((3, 4))
    run = jax.jit(gather_product(mesh_of(2), backend="xla"))
    value, tangent = jax.jvp(lambda s: s * jnp.sum(run(x, w)), (2.0,), (1.0,))
    assert (value, tangent) == (96.0, 48.0)


@pytest.mark.parametrize("dtype", ["int8", "int32"])
def test_integers_do_not_stand_in_the_way_of_a_gradient(dtype, mesh_of):
    """Neither as constants nor as arguments; they have no gradient themselves."""
    t = 4
    counts = jnp.arange(t * 2, dtype=dtype).reshape(t, 2)
    scale = jnp.ones((t, t), "float32")

    def body(scale, counts):
        table = cm.all_gather_matmul(counts, counts.T, "t", backend="xla", algorithm="ring",
                                     preferred_element_type="int32")  # fmt: skip
        cuts = cm.matmul_reduce_scatter(table, table.T, "t", backend="xla", algorithm="ring")
        product = cm.all_gather_matmul(scale, table.astype("float32"), "t", backend="xla")
        return product * jnp.sum(cuts).astype("float32")

    run = jax.shard_map(body, mesh=mesh_of(t), in_specs=(P("t"), P("t")), out_specs=P(None, "t"))
    whole = np.asarray(counts).astype(np.int64)
    tables = [whole @ whole[i : i + 1].T for i in range(t)]
    cuts = np.split(sum(table @ table.T for table in tables), t)
    want = sum(table.sum(1) * cut.sum() for table, cut in zip(tables, cuts, strict=True))
    grad = jax.jit(jax.grad(lambda s: jnp.sum(run(s, counts))))(scale)
    np.testing.assert_allclose(grad, np.tile(want, (t, 1)))
    grad, none = jax.jit(jax.grad(lambda s, c: jnp.sum(run(s, c)), (0, 1), allow_int=True))(
        scale, counts
    )
    np.testing.assert_allclose(grad, np.tile(want, (t, 1)))
    assert none.dtype == jax.dtypes.float0


@pytest.mark.parametrize("argnum", [0, 1])
@pytest.mark.parametrize("mode", ["gather_lhs", "gather_rhs", "scatter"])
def test_one_operand_alone(mode, argnum, mesh_of, x64):
    """The other one is a constant; its gradient is not computed."""
    t = 3
    case = Case(
        "mk,kn->mn", mode, "k" if mode == "gather_rhs" else "m", dict(m=3, k=2, n=4), "float64"
    )
    lhs, rhs = case.operands(t)
    both = [lhs[0], rhs[0]]

    def alone(function):
        def value(x):
            operands = [*both[:argnum], x, *both[argnum + 1 :]]
            return loss(function)([([operands[0]], [operands[1]])])

        return jax.jit(jax.grad(value))(both[argnum])

    got = alone(mapped(mesh_of(t), ("t",), [case], "xla", "two_way"))
    np.testing.assert_allclose(got, alone(plain([case], t)), rtol=1e-12, atol=1e-12)

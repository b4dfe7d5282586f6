"""One suite for all: backend x algorithm x mode x shape x dtype x number of devices, exactly.

All operands are small integers, so that every dtype holds every sum and the results must be equal,
bit for bit, to numpy's in float64. How rounding behaves is for test_numerics.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import collective_matmul as cm
from collective_matmul import backends

from .helpers import Case, gathered, plan_id, plans, quick, run_cases

# An even and an odd number of devices see every form, the others one of each kind.
EVERY, CORE = (1, 2, 3, 6), (5, 7, 8, 16)


def case(spec, mode, letter, dtype="float32", tuples=(False, False), sizes="", **options):
    known = dict(m=2, k=3, n=4, b=2, s=3, d=4, f=3, g=2, h=2, j=5)
    used = set("".join((spec,) if isinstance(spec, str) else spec)) - set(",->")
    known |= {x[0]: int(x[1:]) for x in sizes.split()}
    chosen = {letter: known[letter] for letter in sorted(used)}
    return Case(spec, mode, letter, chosen, dtype, tuples, options)


KINDS = [
    case("mk,kn->mn", "gather_lhs", "m", sizes="m3"),  # free; halves of 1 and 2 rows
    case("mk,kn->mn", "gather_lhs", "k", sizes="k3"),  # contracted
    case("bmk,bkn->bmn", "gather_lhs", "b", sizes="b3"),  # batch
    case("mk,kn->mn", "gather_rhs", "n", sizes="n5"),
    case(
        ("bsd,dfg->bsfg", "bsd,dj->bsj", "bsd,bsn->dn", "bsd,sh->bdsh"),
        "gather_lhs", "s", tuples=(False, True), sizes="s3",
    ),  # one gather feeds several products: other sizes, other parts for the letter to play
    case("mk,kn->mn", "scatter", "m", sizes="m3"),  # a letter of lhs
    case("mk,kn->mn", "scatter", "m", sizes="m1"),  # one half is empty
    case("mk,kn->mn", "scatter", "n", sizes="n3"),  # a letter of rhs
    case("bmk,bkn->bmn", "scatter", "b", sizes="b3"),  # of both
    case(("mk,kn->mn", "mj,jn->mn"), "scatter", "n", tuples=(True, True), sizes="n3"),
]  # fmt: skip
MORE = [
    case("mk,kn->mn", "gather_lhs", "m", sizes="m1"),
    case("mk,kn->nm", "gather_lhs", "m", sizes="m5"),  # the letter last in the result
    case("mk,kn->mn", "gather_lhs", "k", sizes="k1"),
    case("mbk,knb->nbm", "gather_lhs", "b", sizes="b1"),  # batch in the middle, result turned
    case("bsd,df->bsf", "gather_lhs", "s", sizes="s3"),
    case("bshd,hdf->bsf", "gather_lhs", "h", sizes="h3"),  # one of two contracted letters
    case("bsd,bsf->df", "gather_lhs", "s", sizes="s3"),  # a weight gradient
    case("m,n->mn", "gather_lhs", "m", sizes="m3"),  # nothing is contracted
    case("k,k->", "gather_lhs", "k", sizes="k3"),  # everything is
    case("mk,k->m", "gather_lhs", "m", sizes="m3"),
    case("mk,mk->mk", "gather_lhs", "k", sizes="k3"),  # elementwise
    case("mk,kn->mn", "gather_rhs", "k", sizes="k3"),
    case("mk,kn->nm", "gather_rhs", "n", sizes="n1"),
    case("bmk,bkn->mbn", "gather_rhs", "b", sizes="b3"),
    case("bsd,dfg->bsfg", "gather_rhs", "f", sizes="f3"),
    case("mk,kn->mn", "gather_lhs", "m", tuples=(False, True), sizes="m3"),
    case(("mk,kn->mn",), "gather_lhs", "k", tuples=(False, True), sizes="k3"),
    case(("mk,kn->mn", "jk,kn->nj"), "gather_rhs", "k", tuples=(True, False), sizes="k3"),
    case("mk,kn->mn", "gather_rhs", "n", tuples=(True, False), sizes="n3"),
    case("mk,kn->nm", "scatter", "m", sizes="m5"),
    case("bsfg,fgd->bsd", "scatter", "s", sizes="s3"),
    case("bsfg,fgd->dbs", "scatter", "d", sizes="d1"),
    case("m,n->mn", "scatter", "n", sizes="n3"),
    case("k,kn->n", "scatter", "n", sizes="n3"),
    case("mk,mk->mk", "scatter", "m", sizes="m3"),
    case("mk,kn->mn", "scatter", "m", tuples=(True, True), sizes="m3"),
    case(("mk,kn->mn", "mk,nk->mn"), "scatter", "m", tuples=(False, True), sizes="m3"),
    case(("mk,kn->mn", "km,kn->mn"), "scatter", "n", tuples=(True, False), sizes="n3"),
]
FLOATS = [
    case(*form, dtype=dtype)
    for dtype in ("float64", "bfloat16", "float16")
    for form in (
        ("bmk,kn->bmn", "gather_lhs", "m"),
        ("mk,kn->mn", "gather_rhs", "k"),
        ("mk,kn->mn", "scatter", "n"),
    )
]
INTEGERS = [
    case("mk,kn->mn", "gather_lhs", "k", "int8"),  # wraps around, as jnp.einsum does
    case("mk,kn->mn", "gather_lhs", "m", "int8", preferred_element_type="int32"),
    case("mk,kn->mn", "scatter", "m", "int8"),
    case("mk,kn->mn", "scatter", "m", "int8", preferred_element_type="int32"),
    case("mk,kn->mn", "scatter", "n", "int32"),
    case("mk,kn->mn", "gather_lhs", "k", "uint8", preferred_element_type="uint32"),
    case("mk,kn->mn", "gather_lhs", "k", "int8", preferred_element_type="float32"),
    case("mk,kn->mn", "scatter", "m", "int8", preferred_element_type="float32"),
]
WIRES = [
    case("mk,kn->mn", "scatter", "m", "bfloat16", wire_dtype="float32"),
    case("mk,kn->mn", "scatter", "m", "float32", wire_dtype="bfloat16"),
    case("mk,kn->mn", "scatter", "m", "bfloat16", preferred_element_type="float32"),
    case("mk,kn->mn", "gather_lhs", "k", "float16", preferred_element_type="float32"),
    case("mk,kn->mn", "gather_lhs", "m", "bfloat16", wire_dtype="float32"),
    case("mk,kn->mn", "gather_lhs", "k", "float32", preferred_element_type="bfloat16"),
]


def random_forms(n, seed=0):
    """Any letters in any places, each batch, contracted or free, any of them moved."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < n:
        counts = np.cumsum(rng.integers(0, 3, size=4))
        batch, contracted, left, right, _ = np.split(rng.permutation(list("abcdefgh")), counts)
        lhs, rhs, out = (
            "".join(rng.permutation(np.concatenate(parts)))
            for parts in (
                (batch, contracted, left),
                (batch, contracted, right),
                (batch, left, right),
            )
        )
        mode, letters = list(dict(gather_lhs=lhs, gather_rhs=rhs, scatter=out).items())[
            len(found) % 3
        ]
        if letters:
            sizes = {letter: int(rng.integers(1, 4)) for letter in sorted({*lhs, *rhs})}
            found.append(Case(f"{lhs},{rhs}->{out}", mode, str(rng.choice(list(letters))), sizes))
    return found


def check(mesh, axes, cases, plan):
    """Runs the cases by the plan and compares every device's result; skips if any was refused."""
    t = int(np.prod([mesh.shape[name] for name in axes]))
    results, refused = run_cases(mesh, axes, cases, *plan)
    wrong = []
    for each in cases:
        if str(each) in refused:
            continue
        lhs, rhs = each.operands(t)
        wide = each.expected(
            *([np.abs(x.astype(np.float64)) for x in side] for side in (lhs, rhs)), t
        )
        expected = each.expected(lhs, rhs, t)
        dtype = jnp.dtype(each.options.get("preferred_element_type", each.dtype))
        if jnp.issubdtype(dtype, jnp.floating):
            held = [dtype, jnp.dtype(each.options.get("wire_dtype", dtype))]
            exact = min(2 / float(jnp.finfo(x).eps) for x in held)
            assert max(x.max() for x in wide) <= exact, f"{each}: the case itself is not exact"
        assert len(results[str(each)]) == len(expected), str(each)
        for i, (got, want) in enumerate(zip(results[str(each)], expected, strict=True)):
            if got.dtype != dtype or got.shape != want.shape:
                wrong.append(f"{each}, result {i}: {got.dtype}{got.shape}, not {dtype}{want.shape}")
                continue
            off = [
                device for device in range(t) if (got[device] != want[device].astype(dtype)).any()
            ]
            if off:
                wrong.append(f"{each}, result {i}: wrong on devices {off} of {t}")
    assert not wrong, "\n".join(wrong)
    if refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        pytest.skip(f"{len(results)} of {len(cases)} checked; refused: {reasons}")


@pytest.mark.parametrize("t", EVERY)
@pytest.mark.parametrize("plan", [*plans(), (None, None)], ids=plan_id)
def test_every_form(plan, t, mesh_of):
    check(mesh_of(t), ("t",), KINDS + MORE, plan)


@pytest.mark.parametrize("plan", plans(interpreted=True), ids=plan_id)
def test_a_form_of_each_kind_interpreted(plan, mesh_of):
    check(mesh_of(3), ("t",), KINDS, plan)


@pytest.mark.parametrize(
    ("t", "cases"), [(2, MORE), (1, KINDS), (5, KINDS[:1] + KINDS[5:6]), (4, random_forms(4))]
)
@pytest.mark.parametrize("plan", plans(interpreted=True)[-1:], ids=plan_id)
def test_more_forms_interpreted(plan, t, cases, mesh_of):
    check(mesh_of(t), ("t",), cases, plan)


@pytest.mark.parametrize("plan", plans(interpreted=True)[:1], ids=plan_id)
def test_every_dtype_interpreted(plan, mesh_of):
    narrow = [case for case in FLOATS if case.dtype != "float64"]
    check(mesh_of(2), ("t",), narrow + INTEGERS + WIRES, plan)


@pytest.mark.parametrize("t", CORE)
@pytest.mark.parametrize("plan", plans(), ids=plan_id)
def test_a_form_of_each_kind(plan, t, mesh_of):
    check(mesh_of(t), ("t",), KINDS, plan)


@pytest.mark.parametrize("t", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("plan", [*plans(), (None, None)], ids=plan_id)
def test_every_dtype(plan, t, mesh_of, x64):
    check(mesh_of(t), ("t",), FLOATS + INTEGERS + WIRES, plan)


@pytest.mark.parametrize("shape", [(2, 3), (4, 2), (1, 5), (2, 1)], ids=str)
@pytest.mark.parametrize("plan", plans(), ids=plan_id)
def test_two_axes_act_as_their_product(plan, shape, mesh_of):
    check(mesh_of(*shape, names=("a", "b")), ("a", "b"), KINDS, plan)


@pytest.mark.parametrize("plan", plans(interpreted=True)[-1:], ids=plan_id)
def test_two_axes_act_as_their_product_interpreted(plan, mesh_of):
    check(mesh_of(2, 2, names=("a", "b")), ("a", "b"), KINDS[:2] + KINDS[5:6], plan)


@pytest.mark.parametrize("plan", plans(), ids=plan_id)
def test_random_forms(plan, mesh_of):
    check(mesh_of(4), ("t",), random_forms(12), plan)


@pytest.mark.parametrize("t", [1, 2, 5])
@pytest.mark.parametrize("plan", plans(), ids=plan_id)
def test_bare_collectives(plan, t, mesh_of):
    """As lax.all_gather and lax.psum_scatter with tiled=True, along every dimension."""
    options = dict(zip(("backend", "algorithm"), plan, strict=True), axis_name="t")
    rng = np.random.default_rng(t)
    x = rng.integers(-8, 9, size=(t, 2, 1, 3))
    y = rng.integers(-8, 9, size=(t, 2 * t, 1 * t, 3 * t))
    dtypes = ["bfloat16", "int8"]
    dims = [0, 1, -1]

    def body(x, y):
        x, y = ([a[0].astype(dtype) for dtype in dtypes] for a in (x, y))
        wholes = [cm.all_gather(a, dim=dim, **options) for a in x for dim in dims]
        mask = cm.all_gather(x[0] > 0, dim=0, **options)
        sums = [cm.reduce_scatter(a, dim=dim, **options) for a in y for dim in dims]
        wide = cm.reduce_scatter(y[0], dim=2, wire_dtype="float32", **options)
        return [a[None] for a in (*wholes, mask, *sums, wide)]

    run = jax.shard_map(body, mesh=mesh_of(t), in_specs=P("t"), out_specs=P("t"))
    results = jax.jit(run).lower(x, y).compile(compiler_options=quick())(x, y)
    whole = [gathered(np, x, dim % 3) for dim in dims]
    parts = [np.stack(np.split(y.sum(0), t, axis=dim % 3)) for dim in dims]
    want = [a.astype(jnp.dtype(dtype)) for dtype in dtypes for a in whole]
    want += [whole[0] > 0]
    want += [a.astype(jnp.dtype(dtype)) for dtype in dtypes for a in parts]
    want += [parts[2].astype(jnp.bfloat16)]
    for got, exact in zip(results, want, strict=True):
        assert got.dtype == exact.dtype
        np.testing.assert_array_equal(got, exact)


def test_backends_are_found():
    assert {"unfused", "xla", "pallas_tpu"} <= set(backends.names())
    assert len(plans()) >= 5
    assert len(plans(interpreted=True)) >= 4

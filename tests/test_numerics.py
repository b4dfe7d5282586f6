"""Rounding: the error bound that `collective_einsum` states, and the dtypes of its results."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import collective_matmul as cm

from .helpers import Case, lanes_plans, plan_id, plans, run_cases


@dataclasses.dataclass(frozen=True)
class Rough(Case):
    """A case whose values round at every step; `kind` is how they are distributed."""

    kind: str = "normal"

    __str__ = lambda self: f"{Case.__str__(self)} {self.kind}"  # noqa: E731

    def values(self, rng, shape):
        if self.kind == "normal":
            return rng.normal(size=shape)
        if self.kind == "positive":  # rounding errors of one sign add up
            return rng.uniform(0.5, 1.5, size=shape)
        # A big addend on device 0, on the others crumbs that each rounding to 8 bits loses whole.
        sizes = np.full(shape, 0.0545)
        sizes[0] = 1.0
        return sizes


def bound(case, lhs, rhs, t):
    """The docstring's: ((K + t) u(acc) + t u(wire) + u(result)) A, elementwise."""
    dtype = jnp.dtype(case.dtype)
    result = jnp.dtype(case.options.get("preferred_element_type", dtype))
    wire = jnp.dtype(case.options.get("wire_dtype", result))
    acc = np.result_type(np.float32, *(x for x in (dtype, result) if x.itemsize >= 4))
    u = {x: float(jnp.finfo(x).eps) / 2 for x in (acc, wire, result)}
    k = 0
    for spec in case.specs:
        inputs, out = spec.split("->")
        letters = set(inputs) - set(out) - {","}
        moved = t if case.letter in letters and case.mode != "scatter" else 1
        k += np.prod([case.sizes[letter] for letter in letters]) * moved
    k = k * len(lhs) if len(case.specs) == 1 and len(lhs) > 1 else k
    rounds = case.mode == "scatter" and t > 1 and u[wire] > u[acc]
    factor = (k + t) * u[acc] + (t * u[wire] if rounds else 0) + u[result]
    size = case.expected(*([np.abs(x.astype(np.float64)) for x in side] for side in (lhs, rhs)), t)
    return [factor * (1 + 4 * factor) * a for a in size]


FORMS = [
    dict(spec="mk,kn->mn", mode="gather_lhs", letter="m", sizes=dict(m=3, k=37, n=5)),
    dict(spec="mk,kn->mn", mode="gather_lhs", letter="k", sizes=dict(m=3, k=37, n=5)),
    dict(spec="mk,kn->mn", mode="gather_rhs", letter="k", sizes=dict(m=3, k=37, n=5)),
    dict(spec="mk,kn->mn", mode="scatter", letter="m", sizes=dict(m=3, k=37, n=5)),
    dict(
        spec=("mk,kn->mn", "mj,jn->mn"), mode="scatter", letter="n",
        sizes=dict(m=3, k=19, j=37, n=3), tuples=(True, True),
    ),
    dict(spec="m,n->mn", mode="scatter", letter="m", sizes=dict(m=3, n=5), kind="crumbs"),
]  # fmt: skip
DTYPES = [
    dict(dtype="bfloat16"),
    dict(dtype="bfloat16", options=dict(wire_dtype="float32")),
    dict(dtype="bfloat16", options=dict(preferred_element_type="float32")),
    dict(dtype="bfloat16", options=dict(preferred_element_type="float32", wire_dtype="bfloat16")),
    dict(dtype="float16"),
    dict(dtype="float16", options=dict(wire_dtype="float32")),
    dict(dtype="float32"),
    dict(dtype="float32", options=dict(wire_dtype="bfloat16")),
    dict(dtype="float64"),
]
WIRELESS = [x for x in DTYPES if not x.get("options")]  # a gather sends its operand as it is
CASES = [
    Rough(**form, **dtype)
    for form in FORMS
    for dtype in (DTYPES if form["mode"] == "scatter" else WIRELESS)
]
CASES += [Rough(**FORMS[3], **dtype, kind="positive") for dtype in DTYPES]


@pytest.mark.parametrize("t", [1, 2, 5])
@pytest.mark.parametrize("plan", plans(), ids=plan_id)
def test_the_error_bound_holds_elementwise(plan, t, mesh_of, x64):
    results, refused = run_cases(mesh_of(t), ("t",), CASES, *plan)
    wrong = []
    for case in CASES:
        if str(case) in refused:
            continue
        lhs, rhs = case.operands(t)
        for got, exact, most in zip(
            results[str(case)], case.expected(lhs, rhs, t), bound(case, lhs, rhs, t), strict=True
        ):
            error = np.abs(got.astype(np.float64) - exact)
            if not (error <= most).all():
                worst = (error / most).max()
                wrong.append(f"{case}: {worst:.2f} times the bound")
    assert not wrong, "\n".join(wrong)
    if refused:
        pytest.skip(f"{len(results)} of {len(CASES)} checked; refused: {refused}")


@pytest.mark.parametrize("plan", plans(), ids=plan_id)
def test_a_float32_wire_is_better_on_average(plan, mesh_of):
    """For 16-bit operands, whose sums otherwise round at every hop."""
    t, sizes = 8, dict(m=8, k=24, n=24)
    form = dict(spec="mk,kn->mn", mode="scatter", letter="m", sizes=sizes, dtype="bfloat16")
    cases = [Rough(**form), Rough(**form, options={"wire_dtype": "float32"})]
    lhs, rhs = cases[0].operands(t)
    results, _ = run_cases(mesh_of(t), ("t",), cases, *plan)
    (exact,) = cases[0].expected(lhs, rhs, t)
    error = [
        np.sqrt(np.mean((results[str(case)][0].astype(np.float64) - exact) ** 2)) for case in cases
    ]
    assert 0 < error[1] < error[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("plan", plans(), ids=plan_id)
def test_sums_of_16_bit_products_are_kept_in_float32(plan, dtype, mesh_of):
    """1 + 1 + ... beyond where the narrow dtype can count, within a shard and across shards."""
    t, k = 8, 387
    one = functools.partial(jnp.ones, dtype=dtype)

    call = functools.partial(
        cm.collective_einsum, "mk,kn->mn", axis_name="t", backend=plan[0], algorithm=plan[1]
    )

    def body(w):
        gather = call(lhs=one((2, k)), rhs=w, gather_lhs="k", preferred_element_type="float32")
        narrow = call(lhs=w.T, rhs=one((k * t, 2 * t)), scatter="n", wire_dtype="float32")
        return gather, narrow

    run = jax.shard_map(body, mesh=mesh_of(t), in_specs=P(), out_specs=(P("t"), P(None, "t")))
    gather, narrow = jax.jit(run)(one((k * t, 2)))
    assert gather.dtype == jnp.float32
    assert (gather == k * t).all()
    total = float(np.asarray(k * t * t).astype(dtype))  # rounded once, at the end
    assert (narrow == jnp.asarray(total, dtype)).all()


NUMBERS = "int4 uint4 int8 uint8 int16 uint16 int32 uint32 int64 uint64 float8_e4m3fn float8_e5m2"
NUMBERS = (NUMBERS + " bfloat16 float16 float32 float64 complex64 complex128").split()
KINDS = (jnp.signedinteger, jnp.unsignedinteger, jnp.floating, jnp.complexfloating)


def kind(dtype):
    return next(x for x in KINDS if jnp.issubdtype(jnp.dtype(dtype), x))


@pytest.mark.parametrize("dtype", NUMBERS)
def test_result_dtypes_are_those_of_jnp_einsum(dtype, mesh_of, x64):
    """Within a kind of numbers, and from int8 to floats; where another kind is refused, both are
    named."""
    x = jax.ShapeDtypeStruct((4, 4), dtype)
    wrong = []
    for preferred in (None, *NUMBERS):
        try:
            with warnings.catch_warnings(action="ignore"):
                wanted = jax.eval_shape(
                    lambda x, p=preferred: jnp.einsum("mk,kn->mn", x, x, preferred_element_type=p),
                    x,
                ).dtype
        except TypeError:
            continue
        dequantises = dtype == "int8" and preferred in ("float32", "bfloat16")
        for backend, mode in (("xla", "gather_lhs"), ("xla", "scatter"), ("unfused", "gather_rhs")):
            call = functools.partial(
                cm.collective_einsum, "mk,kn->mn", axis_name="t", backend=backend,
                preferred_element_type=preferred, **{mode: "k" if mode == "gather_rhs" else "m"},
            )  # fmt: skip
            spec = {"gather_lhs": (P("t"), P()), "scatter": (P(), P())}.get(mode, (P(), P("t")))
            run = jax.shard_map(
                lambda x, y, call=call: call(lhs=x, rhs=y), mesh=mesh_of(2), in_specs=spec,
                out_specs=P("t"),
            )  # fmt: skip
            try:
                got = jax.eval_shape(run, x, x).dtype
            except TypeError as error:
                if preferred is None or kind(preferred) is kind(dtype) or dequantises:
                    wrong.append(f"{mode} {preferred}: {error}")
                elif dtype not in str(error) or preferred not in str(error):
                    wrong.append(f"{mode} {preferred}: the message names not both: {error}")
                continue
            if got != wanted:
                wrong.append(f"{mode} {preferred}: {got}, jnp.einsum gives {wanted}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("plan", lanes_plans(), ids=plan_id)
def test_a_float32_wire_serves_the_gradient_too(plan, mesh_of):
    """dx of a gather is a scatter, whose sums travel: float32 must lose nothing to the hops."""
    t = 8
    x, w = (jnp.ones((t, 2), "bfloat16"), jnp.full((2, t), 1.0, "bfloat16"))

    def loss(x, w, wire):
        run = jax.shard_map(
            lambda x, w: cm.collective_einsum(
                "mk,kn->mn", x, w, "t", gather_lhs="m", backend=plan[0], algorithm=plan[1],
                wire_dtype=wire,
            ),
            mesh=mesh_of(t), in_specs=(P("t"), P(None, "t")), out_specs=P(None, "t"),
        )  # fmt: skip
        # Cotangents of 1 from device 0 and of a third of an ulp of 1 from each other device.
        crumbs = jnp.where(jnp.arange(t) == 0, 1.0, 2.0**-8 / 1.5).astype("bfloat16")
        return jnp.sum(run(x, w).astype("float32") * crumbs.astype("float32")[None])

    exact = float(1 + 7 * jnp.asarray(2.0**-8 / 1.5, "bfloat16").astype("float32"))
    grad = jax.jit(jax.grad(loss), static_argnums=2)
    wide = grad(x, w, "float32").astype("float32")
    assert (wide == jnp.asarray(exact, "bfloat16").astype("float32")).all()
    narrow = grad(x, w, None).astype("float32")
    assert jnp.mean(jnp.abs(narrow - exact)) >= jnp.mean(jnp.abs(wide - exact))

"""Bad input is refused when a call is traced, in words: what is wrong, by how much, what to do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import collective_matmul as cm
from collective_matmul import algorithms, backends

LHS, RHS = (6, 4), (4, 5)  # "mk,kn->mn" over 3 devices of "t", beside 2 of "d"


def trace(function, mesh, *shapes, dtypes=(), axis_names=("d", "t")):
    """Traces the call within shard_map; nothing is compiled or run."""
    dtypes = dtypes or ("float32",) * len(shapes)

    def array(shape, dtype):
        if isinstance(shape, list):
            return tuple(array(each, dtype) for each in shape)
        return jax.ShapeDtypeStruct(shape, dtype)

    run = jax.shard_map(
        function, mesh=mesh, in_specs=P(), out_specs=P(("t",)), axis_names=set(axis_names),
        check_vma=False,
    )  # fmt: skip
    return jax.eval_shape(run, *map(array, shapes, dtypes))


def refusal(error, mesh, lhs=LHS, rhs=RHS, spec="mk,kn->mn", axis="t", dtypes=(), names=("d", "t"),
            **options):  # fmt: skip
    """The message with which the call is refused."""
    with pytest.raises(error) as caught:
        trace(
            lambda lhs, rhs: cm.collective_einsum(spec, lhs, rhs, axis, **options),
            mesh, lhs, rhs, dtypes=dtypes, axis_names=names,
        )  # fmt: skip
    assert type(caught.value) is error
    return str(caught.value)


def says(message, words):
    missing = [word for word in words.split("|") if word not in message]
    assert not missing, f"{message!r} lacks {missing}"


@pytest.fixture
def mesh(mesh_of):
    return mesh_of(2, 3, names=("d", "t"))


LETTERS = {
    "no mode": ({}, "exactly one|gather_lhs|gather_rhs|scatter"),
    "two modes": (
        dict(gather_lhs="m", scatter="m"),
        "exactly one|{'gather_lhs': 'm', 'scatter': 'm'}",
    ),
    "all modes": (dict(gather_lhs="m", gather_rhs="n", scatter="m"), "exactly one"),
    "gathered letter is in neither": (dict(gather_lhs="q"), "'q'|lhs|'mk'|'mk,kn->mn'"),
    "gathered letter is in the other": (dict(gather_lhs="n"), "'n'|lhs|'mk'|'mk,kn->mn'"),
    "gather_rhs of a letter of lhs": (dict(gather_rhs="m"), "'m'|rhs|'kn'|'mk,kn->mn'"),
    "scattered letter is contracted": (dict(scatter="k"), "'k'|'mn'|'mk,kn->mn'"),
    "scattered letter is in neither": (dict(scatter="z"), "'z'|'mn'|'mk,kn->mn'"),
    "two letters": (dict(gather_lhs="mk"), "one letter|'mk'"),
    "no letter": (dict(gather_lhs=""), "one letter|''"),
    "a number for a letter": (dict(gather_lhs=0), "one letter|0"),
    "ellipsis": (dict(spec="...k,kn->...n", gather_lhs="k"), "...|letter of its own"),
    "no result": (dict(spec="mk,kn", gather_lhs="m"), "'mk,kn'|two operands and a result"),
    "one operand": (dict(spec="mk->mk", gather_lhs="m"), "'mk->mk'|two operands"),
    "three operands": (dict(spec="mk,kn,nj->mj", gather_lhs="m"), "two operands"),
    "a diagonal": (dict(spec="mm,mn->mn", gather_lhs="m"), "'m'|twice|diagonal before the call"),
    "twice in the result": (dict(spec="mk,kn->mm", gather_lhs="m"), "'m'|twice"),
    "a letter from nowhere": (dict(spec="mk,kn->mz", gather_lhs="m"), "'z'|no operand"),
    "a sum over one operand": (
        dict(spec="mkj,kn->mn", lhs=(6, 4, 2), gather_lhs="m"),
        "'j'|lhs|sum over it before the call",
    ),
    "a spec that is none": (dict(spec=3, gather_lhs="m"), "string|3|mk,kn->mn"),
}


@pytest.mark.parametrize("name", LETTERS)
def test_letters(name, mesh):
    call, words = LETTERS[name]
    says(refusal(ValueError, mesh, **call), words)


SIZES = {
    "rank of lhs": (
        dict(lhs=(6, 4, 2), gather_lhs="m"), "lhs|'mk,kn->mn'|'mk'|2 letters|3|(6, 4, 2)",
    ),
    "rank of rhs": (dict(rhs=(4,), gather_lhs="m"), "rhs|'mk,kn->mn'|'kn'|1|(4,)"),
    "rank of a gathered rhs": (
        dict(rhs=(4, 5, 2), gather_rhs="k"), "rhs|'mk,kn->mn'|'kn'|(4, 5, 2)",
    ),
    "rank of lhs beside it": (
        dict(lhs=(6, 12, 2), gather_rhs="k"), "lhs|'mk,kn->mn'|'mk'|(6, 12, 2)",
    ),
    "contracted sizes": (
        dict(rhs=(3, 5), gather_lhs="m"), "'mk,kn->mn'|'k'|4 in lhs (6, 4)|3 in rhs (3, 5)",
    ),
    "contracted sizes, gather_rhs": (
        dict(lhs=(6, 7), gather_rhs="n"), "'mk,kn->mn'|'k'|7 in lhs (6, 7)|4 in rhs (4, 5)",
    ),
    "batch sizes": (
        dict(spec="bmk,bkn->bmn", lhs=(2, 6, 4), rhs=(3, 4, 5), scatter="m"),
        "'b'|2 in lhs|3 in rhs",
    ),
    "shard of the gathered letter": (
        dict(gather_lhs="k"), "lhs|4 of letter 'k' on each of 3 devices, 12 in all|rhs has 4|12",
    ),
    "shard of a gathered letter of rhs": (
        dict(lhs=(6, 5), gather_rhs="k"),
        "rhs|4 of letter 'k' on each of 3 devices, 12 in all|lhs has 5|12",
    ),
    "shard over two axes": (
        dict(gather_lhs="k", axis=("d", "t")), "4 of letter 'k' on each of 6 devices, 24 in all",
    ),
    "rows that do not split": (dict(lhs=(7, 4), scatter="m"), "m=7|3 devices|6 or 9"),
    "too few rows": (dict(lhs=(2, 4), scatter="m"), "m=2|3 devices|3"),
    "columns that do not split": (dict(rhs=(4, 10), scatter="n"), "n=10|3 devices|9 or 12"),
    "rows over two axes": (dict(lhs=(9, 4), scatter="m", axis=("d", "t")), "m=9|6 devices|6 or 12"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name, mesh):
    call, words = SIZES[name]
    says(refusal(ValueError, mesh, **call), words)


DTYPES = {
    "a mix": (dict(dtypes=("float32", "bfloat16"), gather_lhs="m"), "float32|bfloat16|cast"),
    "a mix in a scatter": (
        dict(dtypes=("bfloat16", "float16"), scatter="m"),
        "bfloat16|float16|cast",
    ),
    "floats and integers": (
        dict(dtypes=("float32", "int32"), gather_rhs="n"),
        "float32|int32|cast",
    ),
    "truth values": (dict(dtypes=("bool", "bool"), gather_lhs="m"), "bool|cast"),
    "an integer result": (
        dict(preferred_element_type="int32", gather_lhs="m"),
        "preferred_element_type=int32|float32|cast",
    ),
    "a complex result": (
        dict(preferred_element_type="complex64", scatter="m"),
        "preferred_element_type=complex64|float32|cast",
    ),
    "an integer wire": (dict(wire_dtype="int8", scatter="m"), "wire_dtype=int8|float32|kind"),
    "a float wire for integers": (
        dict(dtypes=("int8", "int8"), wire_dtype="float32", scatter="m"),
        "wire_dtype=float32|int8|kind",
    ),
    "no dtype": (dict(wire_dtype="float31", scatter="m"), "float31"),
}


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name, mesh):
    call, words = DTYPES[name]
    says(refusal(TypeError, mesh, **call), words)


TUPLES = {
    "a tuple of what is gathered": (
        dict(lhs=[LHS, LHS], gather_lhs="m"), "gather_lhs|one array|2 arrays|lhs",
    ),
    "a tuple of what is gathered on the right": (
        dict(rhs=[RHS, RHS], gather_rhs="k"), "gather_rhs|one array|2 arrays|rhs",
    ),
    "specs and arrays of other lengths": (
        dict(spec=("mk,kn->mn",) * 2, rhs=[RHS] * 3, gather_lhs="m"),
        "one length|'spec': 2|'rhs': 3",
    ),
    "operands of other lengths": (
        dict(lhs=[LHS] * 2, rhs=[RHS] * 3, scatter="m"), "one length|'lhs': 2|'rhs': 3",
    ),
    "an empty tuple": (dict(rhs=[], gather_lhs="m"), "at least 1|'rhs': 0"),
    "specs without arrays": (dict(spec=("mk,kn->mn",) * 2, gather_lhs="m"), "2 specs|one spec"),
    "sums of other shapes": (
        dict(rhs=[(4, 5), (4, 7)], scatter="m"), "summed|shapes must agree|(2, 5)|(2, 7)",
    ),
    "a letter of other places": (
        dict(spec=("mk,kn->mn", "km,mn->kn"), lhs=(4, 4), rhs=[(4, 5), (12, 5)], gather_lhs="m"),
        "'m'|dimension 0|'mk,kn->mn'|dimension 1|'km,mn->kn'",
    ),
    "one wrong array": (
        dict(rhs=[RHS, (3, 5)], gather_lhs="m"), "'k'|4 in lhs (6, 4)|3 in rhs (3, 5)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TUPLES)
def test_tuples(name, mesh):
    call, words = TUPLES[name]
    says(refusal(ValueError, mesh, **call), words)


def test_one_dtype_for_all_of_a_tuple(mesh):
    with pytest.raises(TypeError) as caught:
        trace(
            lambda x, v, w: cm.all_gather_matmul(x, (v, w), "t"),
            mesh, LHS, RHS, RHS, dtypes=("float32", "float32", "bfloat16"),
        )  # fmt: skip
    says(str(caught.value), "float32|bfloat16|cast")


AXES = {
    "not bound": (ValueError, dict(axis="model"), "'model'|not bound|('d', 't')|shard_map"),
    "one of two not bound": (ValueError, dict(axis=("t", "model")), "'model'|not bound|shard_map"),
    "left to the compiler": (ValueError, dict(axis="d", names=("t",)), "'d'|not bound|axis_names="),
    "one of two left to the compiler": (
        ValueError, dict(axis=("d", "t"), names=("t",)), "'d'|not bound|axis_names=",
    ),
    "out of mesh order": (ValueError, dict(axis=("t", "d")), "('t', 'd')|order|('d', 't')"),
    "twice": (ValueError, dict(axis=("t", "t")), "('t', 't')|once"),
    "none": (ValueError, dict(axis=()), "()"),
    "a list": (TypeError, dict(axis=["d", "t"]), "['d', 't']|tuple"),
    "None": (TypeError, dict(axis=None), "None|name"),
    "a number": (TypeError, dict(axis=0), "0|name"),
}  # fmt: skip


@pytest.mark.parametrize("name", AXES)
def test_axes(name, mesh):
    error, call, words = AXES[name]
    says(refusal(error, mesh, **call, gather_lhs="m"), words)


def test_outside_of_shard_map():
    for call in (
        lambda: cm.collective_einsum(
            "mk,kn->mn", jnp.ones(LHS), jnp.ones(RHS), "t", gather_lhs="m"
        ),
        lambda: cm.all_gather_matmul(jnp.ones(LHS), jnp.ones(RHS), "t"),
        lambda: cm.matmul_reduce_scatter(jnp.ones(LHS), jnp.ones(RHS), "t"),
        lambda: cm.all_gather(jnp.ones(LHS), "t", dim=0),
        lambda: cm.reduce_scatter(jnp.ones(LHS), "t", dim=0),
    ):
        with pytest.raises(ValueError, match=r"'t' is not bound here.*shard_map"):
            call()


NAMES = {
    "an algorithm": (dict(algorithm="rng"), "'rng'|bidirectional|two_way|Did you mean 'ring'?"),
    "an algorithm like none": (dict(algorithm="xyzzy"), "'xyzzy'|ring"),
    "a backend": (dict(backend="unfuzed"), "'unfuzed'|xla|Did you mean 'unfused'?"),
    "an algorithm for a plain backend": (
        dict(algorithm="too_way", backend="unfused"), "'too_way'|Did you mean 'two_way'?",
    ),
    "a number for a name": (dict(algorithm=3), "3|ring"),
    "a number for a backend": (dict(backend=3), "3|xla"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["gather_lhs", "scatter"])
def test_names(name, mode, mesh):
    call, words = NAMES[name]
    says(refusal(ValueError, mesh, **call, **{mode: "m"}), words)


@pytest.mark.parametrize("algorithm", algorithms.names())
@pytest.mark.parametrize("backend", [x for x in backends.names() if not backends.get(x).decomposes])
def test_a_named_choice_that_cannot_be_honoured_says_why(backend, algorithm, mesh):
    named = dict(backend=backend, algorithm=algorithm)
    for mode in ("gather_lhs", "scatter"):
        message = refusal(NotImplementedError, mesh, **named, **{mode: "m"})
        says(message, f"{algorithm!r}|{backend!r}|drop algorithm=")
    for collective in (cm.all_gather, cm.reduce_scatter):
        with pytest.raises(NotImplementedError, match=f"{algorithm!r}"):
            trace(functools.partial(collective, axis_name="t", dim=0, **named), mesh, LHS)


def test_a_named_choice_is_refused_on_one_device_too(mesh_of):
    """What is refused does not depend on how many devices there happen to be."""
    mesh = mesh_of(1, 1, names=("d", "t"))
    refusal(NotImplementedError, mesh, backend="unfused", algorithm="ring", gather_lhs="m")
    refusal(ValueError, mesh, algorithm="rng", gather_lhs="m")
    refusal(ValueError, mesh, axis=("t", "d"), gather_lhs="m")


COLLECTIVES = {
    "beyond the last dimension": (ValueError, cm.all_gather, dict(dim=2), "dim=2|(6, 4)"),
    "before the first": (ValueError, cm.reduce_scatter, dict(dim=-3), "dim=-3|(6, 4)"),
    "rows that do not split": (ValueError, cm.reduce_scatter, dict(dim=1), "4|3 devices|3 or 6"),
    "no number": (TypeError, cm.all_gather, dict(dim="m"), "'m'|dim"),
    "an unknown algorithm": (ValueError, cm.all_gather, dict(dim=0, algorithm="dirct"), "'direct'"),
    "an unknown backend": (ValueError, cm.reduce_scatter, dict(dim=0, backend="xl"), "'xla'"),
    "a wire of another kind": (
        TypeError, cm.reduce_scatter, dict(dim=0, wire_dtype="int8"), "int8|float32",
    ),
    "an unbound axis": (ValueError, cm.all_gather, dict(dim=0, axis_name="x"), "'x'|not bound"),
}  # fmt: skip


@pytest.mark.parametrize("name", COLLECTIVES)
def test_bare_collectives(name, mesh):
    error, collective, options, words = COLLECTIVES[name]
    with pytest.raises(error) as caught:
        trace(functools.partial(collective, **{"axis_name": "t", **options}), mesh, LHS)
    says(str(caught.value), words)


def test_truth_values_are_gathered_but_not_summed(mesh):
    """A mask may travel; a sum of truth values is no number."""
    out = trace(functools.partial(cm.all_gather, axis_name="t", dim=0), mesh, LHS, dtypes=("bool",))
    assert out.dtype == bool
    with pytest.raises(TypeError, match="bool"):
        trace(
            functools.partial(cm.reduce_scatter, axis_name="t", dim=0), mesh, LHS, dtypes=("bool",)
        )


def test_explain_refuses_as_the_call_would():
    lhs, rhs = (jax.ShapeDtypeStruct(shape, np.float32) for shape in (LHS, RHS))
    explain = functools.partial(cm.explain, "mk,kn->mn", lhs, rhs)
    for error, options, words in (
        (ValueError, dict(axis_size=3), "exactly one"),
        (ValueError, dict(axis_size=3, gather_lhs="k"), "4 of letter 'k' on each of 3 devices"),
        (ValueError, dict(axis_size=4, scatter="m"), "m=6|4 devices|4 or 8"),
        (ValueError, dict(gather_lhs="m"), "axis_name|axis_size"),
        (ValueError, dict(axis_name="t", axis_size=3, gather_lhs="m"), "axis_name|axis_size|'t'|3"),
        (ValueError, dict(axis_size=0, gather_lhs="m"), "axis_size=0"),
        (ValueError, dict(axis_name="t", gather_lhs="m"), "'t'|not bound"),
        (ValueError, dict(axis_size=3, gather_lhs="m", algorithm="rng"), "'ring'"),
        (ValueError, dict(axis_size=3, gather_lhs="m", chip="v9"), "'v9'|v5e"),
        (
            NotImplementedError,
            dict(axis_size=3, gather_lhs="m", backend="unfused", algorithm="ring"),
            "'ring'|'unfused'",
        ),
        (TypeError, dict(axis_size=3, scatter="m", wire_dtype="int8"), "int8|float32"),
    ):
        with pytest.raises(error) as caught:
            explain(**options)
        says(str(caught.value), words)


def test_the_remedies_work(mesh):
    """What some of the messages above advise is accepted."""
    accepted = functools.partial(cm.collective_einsum, "mk,kn->mn")
    for lhs, rhs, axis, options in (
        ((6, 4), (12, 5), "t", dict(gather_lhs="k")),  # "give rhs 12 of it"
        ((9, 4), (4, 5), "t", dict(scatter="m")),  # "6 or 9"
        ((6, 4), (4, 5), ("d", "t"), dict(gather_lhs="m")),  # "write ('d', 't')"
        ((6, 4), (4, 5), "t", dict(gather_lhs="m", backend="unfused")),  # "drop algorithm="
        ((6, 4), (4, 5), "t", dict(gather_lhs="m", algorithm="ring")),  # "Did you mean 'ring'?"
    ):
        assert trace(
            lambda lhs, rhs, axis=axis, options=options: accepted(lhs, rhs, axis, **options),
            mesh, lhs, rhs,
        ).shape  # fmt: skip

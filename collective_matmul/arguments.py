"""Reads a user's call into an `Operation`, or refuses it with the numbers and the remedy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from collective_matmul.operation import (
    AxisName,
    Operand,
    Operation,
    Term,
    gather_term,
    scatter_term,
)
from collective_matmul.product import swapped_precision
from collective_matmul.spec import Spec

Arrays = Any | Sequence[Any]


class Call(NamedTuple):
    """An operation and its operands, one of each for every term.

    In a gather every `lhs` is the moving operand. `single`: the user gave one product, not a tuple.
    """

    op: Operation
    lhs: tuple[Any, ...]
    rhs: tuple[Any, ...]
    single: bool


class Options(NamedTuple):
    """The keywords that every form of the primitive shares."""

    algorithm: str | None = None
    backend: str | None = None
    preferred_element_type: Any = None
    wire_dtype: Any = None
    precision: Any = None


def read(
    spec: str | Sequence[str],
    lhs: Arrays,
    rhs: Arrays,
    axis_name: AxisName,
    t: int,
    *,
    gather_lhs: str | None,
    gather_rhs: str | None,
    scatter: str | None,
    options: Options,
) -> Call:
    """The operation that a call of `collective_einsum` names, on local shards over `t` devices.

    Raises:
      ValueError: on an unreadable spec, not exactly one mode, a letter or size that does not fit.
      TypeError: on operands of different dtypes, or a dtype that the result cannot have.
    """
    modes: dict[str, Any] = {"gather_lhs": gather_lhs, "gather_rhs": gather_rhs, "scatter": scatter}
    named = {mode: letter for mode, letter in modes.items() if letter is not None}
    if len(named) != 1:
        raise ValueError(
            "name one letter with exactly one of gather_lhs, gather_rhs and scatter; got "
            f"{named or 'none of them'}"
        )
    ((mode, letter),) = named.items()
    if not isinstance(letter, str) or len(letter) != 1:
        raise ValueError(f"{mode} names one letter of the spec, got {letter!r}")

    single = not (isinstance(lhs, (tuple, list)) or isinstance(rhs, (tuple, list)))
    specs, left, right = _paired(spec, lhs, rhs, mode)
    dtype = common_dtype(left + right)
    out = _result_dtype(dtype, options.preferred_element_type)
    precision = options.precision
    precision = tuple(precision) if isinstance(precision, list) else precision
    build: Callable[..., Term] = scatter_term
    if mode != "scatter":
        build = functools.partial(gather_term, side="rhs" if mode == "gather_rhs" else "lhs")
    terms = tuple(
        build(x, Operand.of(a), Operand.of(b), letter, t, out)
        for x, a, b in zip(specs, left, right, strict=True)
    )
    if mode == "gather_rhs":  # from here on, what moves is the left operand
        left, right, precision = right, left, swapped_precision(precision)
    op = Operation(
        kind="scatter" if mode == "scatter" else "gather",
        letter=letter,
        terms=terms,
        axis_name=axis_name,
        t=t,
        precision=precision,
        wire_dtype=wire_dtype_of(out, options.wire_dtype),
        algorithm=options.algorithm,
        backend=options.backend,
    )
    _check_alike(op, specs)
    return Call(op, tuple(left), tuple(right), single)


def axis_size(axis_name: AxisName) -> int:
    """Devices along `axis_name`, which must be bound and, if a tuple, in mesh order.

    Raises:
      ValueError: if an axis is not bound here, named twice, or out of mesh order.
      TypeError: if it is no name at all.
    """
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name is a name or a tuple of names, got {axis_name!r}")
    mesh = jax.sharding.get_abstract_mesh()
    try:
        size = lax.axis_size(axis_name)
    except (NameError, TypeError) as error:
        manual = tuple(mesh.manual_axes)
        raise ValueError(
            f"axis {axis_name!r} is not bound here (bound mesh axes: {manual or 'none'}); call "
            "inside jax.shard_map over that axis (its axis_names= must include it), or inside "
            "jax.vmap with that axis_name"
        ) from error
    if not names or len(set(names)) < len(names):
        raise ValueError(f"axis_name {axis_name!r} must name each axis once")
    ordered = tuple(name for name in mesh.axis_names if name in names)
    if len(ordered) == len(names) and ordered != names:
        raise ValueError(
            f"axis_name {names} is not in the mesh's order; write {ordered}: the order of the "
            "shards is that of the devices' indices along these axes"
        )
    return size


def _paired(
    spec: str | Sequence[str], lhs: Arrays, rhs: Arrays, mode: str
) -> tuple[list[Spec], list[Any], list[Any]]:
    """Specs, left and right operands, one of each for every product."""
    for name, operand in (("lhs", lhs), ("rhs", rhs)):
        if mode == f"gather_{name}" and isinstance(operand, (tuple, list)):
            raise ValueError(
                f"{mode} gathers one array, which may meet several others; got {len(operand)} "
                f"arrays as {name}; make one call for each, or concatenate them"
            )
    counts = {
        name: len(value)
        for name, value in (("spec", spec), ("lhs", lhs), ("rhs", rhs))
        if isinstance(value, (tuple, list))
    }
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(f"tuples of one call must have one length of at least 1; got {counts}")
    if set(counts) == {"spec"}:
        raise ValueError(f"{counts['spec']} specs but one lhs and one rhs; give one spec")
    n = max(counts.values(), default=1)

    def spread(value: Any) -> list[Any]:
        return list(value) if isinstance(value, (tuple, list)) else [value] * n

    return [Spec.parse(text) for text in spread(spec)], spread(lhs), spread(rhs)


def common_dtype(operands: Sequence[Any]) -> np.dtype:
    """The one dtype of the operands.

    Raises:
      TypeError: if they have several, or it is no number's.
    """
    dtypes = list(dict.fromkeys(np.dtype(x.dtype) for x in operands))
    if len(dtypes) > 1:
        raise TypeError(
            f"the operands have different dtypes, {', '.join(map(str, dtypes))}; cast them to one: "
            "what is narrow on the wire should be narrow by choice"
        )
    if not jnp.issubdtype(dtypes[0], jnp.number):
        raise TypeError(
            f"operands of dtype {dtypes[0]} cannot be multiplied; cast them to a number"
        )
    return dtypes[0]


def _kind(dtype: np.dtype) -> Any:
    kinds = (jnp.complexfloating, jnp.floating, jnp.integer)
    return next((kind for kind in kinds if jnp.issubdtype(dtype, kind)), None)


def _result_dtype(dtype: np.dtype, preferred: Any) -> np.dtype:
    out = dtype if preferred is None else np.dtype(jax.dtypes.canonicalize_dtype(preferred))
    dequantised = _kind(dtype) is jnp.integer and _kind(out) is jnp.floating
    if _kind(out) is not _kind(dtype) and not dequantised:
        raise TypeError(
            f"preferred_element_type={out} is of another kind than the operands' {dtype}; "
            "cast the operands, or the result, instead"
        )
    return out


def wire_dtype_of(out: np.dtype, wire: Any) -> np.dtype | None:
    """The dtype `wire` names, or None for the result's own.

    Raises:
      TypeError: if it is of another kind (integer, float, complex) than the result's.
    """
    if wire is None:
        return None
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(wire))
    if _kind(dtype) is not _kind(out):
        raise TypeError(
            f"wire_dtype={dtype} is of another kind than the result's {out}; partial sums cross "
            "the wire in a dtype of the result's kind, such as float32 for bfloat16"
        )
    return dtype


def _check_alike(op: Operation, specs: list[Spec]) -> None:
    """Products that share a gather or a sum must agree on the shared array."""
    first = op.terms[0]
    for spec, term in zip(specs, op.terms, strict=True):
        shared = ("lhs", "out")[op.kind == "scatter"]
        if getattr(term, shared).shape != getattr(first, shared).shape:
            raise ValueError(
                f"the products of one scatter are summed, so their shapes must agree: '{specs[0]}' "
                f"gives {first.out.shape} a device, '{spec}' gives {term.out.shape}"
            )
        letters, reference = getattr(term.spec, shared), getattr(first.spec, shared)
        if letters.index(op.letter) != reference.index(op.letter):
            raise ValueError(
                f"letter {op.letter!r} is dimension {reference.index(op.letter)} of the shared "
                f"array in '{specs[0]}' but dimension {letters.index(op.letter)} in '{spec}'"
            )

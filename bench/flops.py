"""FLOPs of a program, counted from its jaxpr: a new model needs no formula.

Counted are the products (see `bench.products`), of all devices together, as often as they run:

- a scan runs its body `length` times; a call, `remat`, `custom_vjp` or `custom_jvp` runs its own
  once. In a gradient jax has put the rules of custom_vjp in place, and they are counted;
- the body of a `shard_map` is written for one device, so it counts once for every device of the
  axes that it makes manual. What several devices do alike counts as often as it is done;
- of the branches of a `cond` the dearest counts, and a remark says so;
- a kernel (`pallas_call` and other custom calls) counts what its `cost_estimate` declares;
- what no output needs does not count: the compiler drops it.

Never silently zero: what holds products but not how often they run (a `while`), a kernel without
a declared cost, a matrix decomposition, and every primitive that this file does not know, is
listed in `Count.uncounted`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.extend.core import primitives
from jax.interpreters import partial_eval

from bench.products import RULES

ATTENTION = "full attention: each product as traced, masked or not"
DECLARED_ATTENTION = "attention as traced (in full, masked or not) or as its kernels declare"


class Product(NamedTuple):
    """One kind of product: the primitive, its operands' types, and whether a kernel declares it."""

    primitive: str
    operands: str
    declared: bool = False


@dataclasses.dataclass(frozen=True)
class Count:
    """What a program multiplies, on all its devices together.

    Args:
      products: FLOPs by product, of all its runs.
      uncounted: how often something runs that is not in `products`, by what it is.
      remarks: what was decided on the way.
    """

    products: Mapping[Product, int] = dataclasses.field(default_factory=dict)
    uncounted: Mapping[str, int] = dataclasses.field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """The sum over the products."""
        return sum(self.products.values())

    @property
    def convention(self) -> str:
        """How attention is counted; it belongs beside the number."""
        declared = any(product.declared for product in self.products)
        return DECLARED_ATTENTION if declared else ATTENTION

    def times(self, runs: int) -> Count:
        """The count of so many runs."""
        return Count(
            {product: runs * flops for product, flops in self.products.items()},
            {what: runs * times for what, times in self.uncounted.items()},
            self.remarks,
        )

    def __add__(self, other: Count) -> Count:
        return Count(
            _sum(self.products, other.products),
            _sum(self.uncounted, other.uncounted),
            tuple(dict.fromkeys(self.remarks + other.remarks)),
        )

    def __str__(self) -> str:
        lines = [f"{self.flops / 1e9:,.6g} GFLOP ({self.convention})"]
        for product, flops in sorted(self.products.items(), key=lambda row: -row[1]):
            lines.append(
                f"{flops / max(self.flops, 1):7.2%} {flops / 1e9:14,.6g}  {product.primitive} "
                f"{product.operands}"
            )
        lines += [f"not counted: {what}, {n} times" for what, n in self.uncounted.items()]
        lines += [f"remark: {remark}" for remark in self.remarks]
        return "\n".join(lines)


def count(function: Callable[..., Any], *args: Any) -> Count:
    """Traces `function(*args)` and counts it; nothing is computed or allocated.

    Args:
      function: anything that `jax.make_jaxpr` traces: plain, jitted, a gradient, a whole step.
      *args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
    """
    return count_jaxpr(jax.make_jaxpr(function)(*args))


def count_jaxpr(jaxpr: Any) -> Count:
    """Counts a jaxpr, open or closed, for example `jax.jit(f).trace(*args).jaxpr`."""
    opened = getattr(jaxpr, "jaxpr", jaxpr)
    live, _ = partial_eval.dce_jaxpr(opened, [True] * len(opened.outvars))
    return _inside(live)


def _inside(jaxpr: Any) -> Count:
    return _total(map(_equation, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def _equation(eqn: Any) -> Count:
    name, params = eqn.primitive.name, eqn.params
    if name in RULES:
        operands = " . ".join(_type(v.aval) for v in eqn.invars[:2])
        return Count({Product(name, operands): RULES[name](eqn)})
    if name in _REPEATED:
        return _REPEATED[name](params)
    declared = _declared(params)
    if declared is not None:
        label = str(params.get("name") or "kernel")
        return Count({Product(name, f"{label}, as declared", declared=True): declared})
    inside = _total(map(_inside, core.jaxprs_in_params(params)))
    if name in _CALLS:
        return inside
    if name in _KNOWN and not inside.products and not inside.uncounted:
        return Count()
    return Count(uncounted={_describe(name, params, inside): 1})


def _scan(params: Any) -> Count:
    return _inside(params["jaxpr"]).times(params["length"])


def _shard_map(params: Any) -> Count:
    # An inner shard_map names only the axes that it makes manual itself.
    devices = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return _inside(params["jaxpr"]).times(devices)


def _cond(params: Any) -> Count:
    branches = [_inside(branch) for branch in params["branches"]]
    dearest = max(branches, key=lambda branch: branch.flops)
    uncounted = {what: n for branch in branches for what, n in branch.uncounted.items()}
    remarks = {remark: None for branch in branches for remark in branch.remarks}
    if len({branch.flops for branch in branches}) > 1:
        told = " or ".join(f"{branch.flops:,}" for branch in branches)
        remarks[f"a cond has branches of {told} FLOPs; the dearest is counted"] = None
    return Count(dearest.products, uncounted, tuple(remarks))


def _while(params: Any) -> Count:
    inside = _inside(params["cond_jaxpr"]) + _inside(params["body_jaxpr"])
    if not inside.products and not inside.uncounted:
        return inside
    unknown = f"while of {inside.flops:,} FLOPs a trip, and its number of trips is unknown"
    return Count(uncounted=_sum({unknown: 1}, inside.uncounted), remarks=inside.remarks)


_REPEATED: dict[str, Callable[[Any], Count]] = {
    "scan": _scan,
    "shard_map": _shard_map,
    "cond": _cond,
    "while": _while,
}

# What runs the jaxprs among its parameters once.
_CALLS = {
    *("jit", "call", "closed_call", "core_call", "eval_jaxpr", "composite", "custom_vmap_call"),
    *("remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"),
}

# The primitives of jax without a product in them. What is not here and has no rule is listed, so a
# primitive that is missing costs a line of the report, never a wrong number.
_PUBLIC = {
    value.name
    for module in (primitives, jax.lax)
    for value in vars(module).values()
    if isinstance(value, core.Primitive)
}
_HOLDS_PRODUCTS = {
    *(p.name for p in vars(jax.lax.linalg).values() if isinstance(p, core.Primitive)),
    *("fft", "custom_linear_solve"),
}
_UNEXPORTED = {
    *("empty", "zeros_like", "reshard", "layout_constraint", "tie", "platform_index"),
    *("random_wrap", "random_unwrap", "random_clone", "iota_2x32_shape"),
    *("pvary", "reduced_vary_cast", "reduced_vary_cast_p", "vary_unreduced_cast"),
    *("reduce_scatter", "psum_invariant", "all_gather_invariant", "all_gather_reduced"),
    *("new_ref", "empty_ref", "freeze", "addupdate", "debug_callback", "debug_print"),
}
_KNOWN = (_PUBLIC | _UNEXPORTED) - _HOLDS_PRODUCTS


def _declared(params: Any) -> int | None:
    """The FLOPs that a kernel's cost estimate declares, for its whole grid."""
    cost = params.get("cost_estimate")
    return None if cost is None else int(cost.flops)


def _describe(name: str, params: Any, inside: Count) -> str:
    label = params.get("name") or params.get("target_name")
    what = f"{name} {label}" if label else name
    if "cost_estimate" in params:
        return f"{what}, a kernel without a cost_estimate"
    if inside.products or inside.uncounted:
        return f"{what}, which runs products an unknown number of times"
    return f"{what}, whose products are not known"


def _type(aval: Any) -> str:
    return f"{aval.dtype.name}[{','.join(map(str, aval.shape))}]"


def _total(counts: Any) -> Count:
    return functools.reduce(operator.add, counts, Count())


def _sum(a: Mapping[Any, int], b: Mapping[Any, int]) -> dict[Any, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in [*a, *b]}

"""What a call would do, and why: the cost model's choice beside all that it was chosen from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from collective_matmul import hardware
from collective_matmul.arguments import Options, axis_size, read
from collective_matmul.compiling import current_chip
from collective_matmul.cost import Estimate, least_gain, ranked
from collective_matmul.operation import AxisName, Operation

TITLES = ("backend", "algorithm", "steps", "bytes/hop", "bytes/link", "FLOPs/step")
TIMES = ("compute", "wire", "hidden", "exposed", "total")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The plan that a call runs, with the alternatives; `print` it for a table.

    Every time is a *prediction* of the cost model, in seconds, for one device.
    """

    op: Operation
    products: tuple[str, ...]  # the specs, as the call has them
    chip: hardware.Chip
    chosen: Estimate
    alternatives: tuple[Estimate, ...]
    backward: tuple[Explanation, ...] = ()  # the operations of the gradient, chosen likewise

    @property
    def reason(self) -> str:
        """Why the plan was chosen, in a sentence."""
        named = [
            f"{x}={getattr(self.op, x)!r}" for x in ("algorithm", "backend") if getattr(self.op, x)
        ]
        if self.op.t == 1:
            return "one device: nothing travels"
        if named and not self.alternatives:
            return f"named: {', '.join(named)}"
        plain = [x for x in (self.chosen, *self.alternatives) if x.plan.algorithm is None]
        if not plain:
            return f"the cheapest that honours {', '.join(named)}"
        if self.chosen in plain:
            asked = sorted({least_gain(self.chip, x.plan) for x in self.alternatives})
            return (
                "no decomposition is predicted to beat the plain collective by "
                f"{', a kernel by '.join(f'{x:.0%}' for x in asked)}: it falls back"
            )
        gain = plain[0].total / self.chosen.total
        return f"predicted {gain:.2f} times as fast as the plain collective"

    def __str__(self) -> str:
        chip = self.chip.name + (" (assumed constants)" if self.chip.assumed else "")
        head = (
            f"{self.op.kind} of {self.op.letter!r} in {', '.join(self.products)} over "
            f"{self.op.axis_name!r}={self.op.t}, {self.op.travelling.dtype} on the wire, "
            f"for {chip}\n"
            f"chosen: {_name(self.chosen)}: {self.reason}\n"
        )
        rows = [_row(x, "*" if x is self.chosen else "") for x in (self.chosen, *self.alternatives)]
        table = _table([("", *TITLES, *(f"{x} us" for x in TIMES)), *rows])
        later = "".join(f"\n\nits gradient: {each}" for each in self.backward)
        return f"{head}{table}{later}"


def explain(
    spec: str | Sequence[str],
    lhs: Any,
    rhs: Any,
    axis_name: AxisName | None = None,
    *,
    axis_size: int | None = None,
    chip: str | hardware.Chip | None = None,
    gather_lhs: str | None = None,
    gather_rhs: str | None = None,
    scatter: str | None = None,
    algorithm: str | None = None,
    backend: str | None = None,
    preferred_element_type: Any = None,
    wire_dtype: Any = None,
    precision: Any = None,
) -> Explanation:
    """What `collective_einsum` with these arguments would run, and why.

    Works inside shard_map on the same arguments, and anywhere else on shapes:

        lhs = jax.ShapeDtypeStruct((2048, 6144), jnp.bfloat16)
        rhs = jax.ShapeDtypeStruct((6144, 10752), jnp.bfloat16)
        print(explain("mk,kn->mn", lhs, rhs, axis_size=4, chip="v4", gather_lhs="m"))

    Args:
      spec, lhs, rhs: as in `collective_einsum`; only the local shapes and dtypes matter.
      axis_name: the axis, if it is bound here.
      axis_size: the number of devices, if it is not.
      chip: a chip, its name (`collective_matmul.hardware.names()`) or its jax device kind; default
        the one that is being traced for.
      gather_lhs, gather_rhs, scatter: as in `collective_einsum`.
      algorithm, backend, preferred_element_type, wire_dtype, precision: as in `collective_einsum`.

    Returns:
      The choice for the call, and for the operations of its gradient (`.backward`).

    Raises:
      ValueError, TypeError, NotImplementedError: as `collective_einsum` would; ValueError also if
        neither or both of `axis_name` and `axis_size` say how many devices there are.
    """
    t = _devices(axis_name, axis_size)
    call = read(
        spec,
        lhs,
        rhs,
        axis_name or "axis",
        t,
        gather_lhs=gather_lhs,
        gather_rhs=gather_rhs,
        scatter=scatter,
        options=Options(algorithm, backend, preferred_element_type, wire_dtype, precision),
    )
    if chip is None:
        chip = current_chip()
    elif isinstance(chip, str):
        chip = hardware.chip(chip)
    backward = tuple(
        _explained(dual, tuple(str(term.spec) for term in dual.terms), chip)
        for dual in call.op.duals()
    )
    products = (spec,) * len(call.op.terms) if isinstance(spec, str) else tuple(spec)
    return _explained(call.op, products, chip, backward)


def _devices(axis_name: AxisName | None, size: int | None) -> int:
    if (axis_name is None) == (size is None):
        raise ValueError(
            "give axis_name inside shard_map, or axis_size elsewhere, and not both; got "
            f"{axis_name!r} and {size!r}"
        )
    if size is None:
        assert axis_name is not None
        return axis_size(axis_name)
    if size < 1:
        raise ValueError(f"axis_size={size}: there is at least one device")
    return size


def _explained(
    op: Operation,
    products: tuple[str, ...],
    chip: hardware.Chip,
    backward: tuple[Explanation, ...] = (),
) -> Explanation:
    chosen, *others = ranked(op, chip)
    return Explanation(op, products, chip, chosen, tuple(others), backward)


def _name(option: Estimate) -> str:
    fat = ", one product at the end" if option.plan.fat else ""
    return f"{option.plan.backend} {option.plan.algorithm or ''}".rstrip() + fat


def _row(option: Estimate, mark: str) -> tuple[str, ...]:
    plan = option.plan
    algorithm = (plan.algorithm or "-") + (" +fat" if plan.fat else "")
    counts = (option.steps, option.hop_bytes, round(option.link_bytes), option.step_flops)
    times = (f"{getattr(option, x) * 1e6:.1f}" for x in TIMES)
    return (mark, plan.backend, algorithm, *(f"{x:,}" for x in counts), *times)


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )

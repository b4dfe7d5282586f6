"""FLOPs of a whole compiled program: every product as often as it runs.

`Total.distinct` is the figure to hold against `bench.flops.count` of the same program: that counts
all devices together, this one device. They agree unless several devices do the same product, which
here counts on each of them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from collective_matmul.inspect import kernels
from collective_matmul.inspect.dots import RUN_ONCE, flops
from collective_matmul.inspect.hlo import Computation, Instruction, Module
from collective_matmul.inspect.repeated import repeated_flops
from collective_matmul.inspect.trips import trips

_SOLVERS = ("cholesky", "triangular-solve", "fft")


@dataclasses.dataclass(frozen=True)
class Total:
    """The products of a program.

    Args:
      flops: of one device in one run of the program.
      repeated: of these, FLOPs of products that the compiler put into the program more than once.
      uncounted: how often something is there whose products are not in `flops`, by what it is.
    """

    flops: int = 0
    repeated: int = 0
    uncounted: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def distinct(self) -> int:
        """FLOPs of the products as the program was written."""
        return self.flops - self.repeated

    def times(self, runs: int) -> Total:
        """The products of so many runs."""
        uncounted = {what: runs * n for what, n in self.uncounted.items()}
        return Total(runs * self.flops, runs * self.repeated, uncounted)

    def __add__(self, other: Total) -> Total:
        return Total(
            self.flops + other.flops,
            self.repeated + other.repeated,
            Counter(self.uncounted) + Counter(other.uncounted),
        )


def total_flops(module: Module) -> Total:
    """Sums the products of a program, from its entry down.

    A loop counts its body once for every trip, a fusion or call what it calls, a conditional its
    dearest branch. A loop whose trips cannot be told, a custom call without a declared cost and a
    matrix decomposition are listed instead.

    Args:
      module: the program.
    """
    return _sequence(module, module.main)


def _sequence(module: Module, computation: Computation) -> Total:
    """A computation whose instructions run one by one: the entry, a loop's body, a branch."""
    return _sum(module, computation) + Total(repeated=repeated_flops(module, computation))


def _sum(module: Module, computation: Computation) -> Total:
    total = Total()
    for instruction in computation.instructions:
        total += _instruction(module, instruction)
    return total


def _instruction(module: Module, instruction: Instruction) -> Total:
    opcode = instruction.opcode
    if opcode == "while":
        return _loop(module, instruction)
    if opcode == "conditional":
        branches = (_sequence(module, branch) for branch in module.callees(instruction))
        return max(branches, key=lambda branch: branch.flops)
    if opcode in RUN_ONCE:
        return sum((_sum(module, called) for called in module.callees(instruction)), Total())
    if opcode.startswith("custom-call") and _unknown(module, instruction):
        name = f"custom-call {kernels.target(instruction)} without a declared cost"
        return Total(uncounted={name: 1})
    if opcode in _SOLVERS:
        return Total(uncounted={f"{opcode}, whose products are not known": 1})
    return Total(flops(module, instruction))


def _loop(module: Module, instruction: Instruction) -> Total:
    body = module.computations[instruction.attributes["body"].lstrip("%")]
    inside = _sequence(module, body)
    runs = trips(module, instruction)
    if runs is not None:
        return inside.times(runs)
    if not inside.flops:
        return inside
    unknown = f"while of {inside.flops:,} FLOPs a trip, and its number of trips is unknown"
    return Total(uncounted={unknown: 1, **inside.uncounted})


def _unknown(module: Module, instruction: Instruction) -> bool:
    """Whether nothing tells what a custom call does: no cost, no name and nothing that it calls."""
    known = kernels.cost(module, instruction) is not None
    return bool(kernels.target(instruction)) and not known and not instruction.called

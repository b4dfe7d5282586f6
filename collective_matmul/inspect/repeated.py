"""Products that a compiled program does more than once, though the program was written with one.

A compiler may put the same product into several fusions, where that is cheaper than to write its
result to memory: the TPU compiler does so with attention's logits. The device runs them all, and
the jaxpr has one. They are told by numbering values: two instructions get the same number if they
do the same to values of the same numbers. What a rematerialised layer computes again is no such
repetition, because jax gives it another name than the first.

Reference: B. Alpern, M. Wegman, F. Zadeck, Detecting Equality of Variables in Programs, 1988.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

from collective_matmul.inspect.dots import flops
from collective_matmul.inspect.hlo import Computation, Instruction, Module

_SAME = {"copy", "copy-start", "copy-done", "slice-done", "optimization-barrier", "opt-barrier"}
_OPAQUE = re.compile(
    r"while|conditional|custom-call|rng|infeed|outfeed|send|recv|async|scatter|sort|"
    r"all-|collective-|reduce-scatter|ragged-all"
)
# Where what an instruction does ends, and what is said about it begins.
_ABOUT = re.compile(r",? ?(?:metadata|backend_config|frontend_attributes|to_apply)=")


def repeated_flops(module: Module, computation: Computation) -> int:
    """FLOPs of the products in a computation that were already done before in it.

    Args:
      module: the program.
      computation: its entry or the body of a loop; what its instructions fuse belongs to it.

    Returns:
      FLOPs of one run, a part of what `flops` counts for its instructions.
    """
    numbering = _Numbering(module)
    parameters = [numbering.number(("parameter", each.name)) for each in computation.parameters]
    numbering.run(computation, parameters)
    return numbering.repeated


class _Numbering:
    def __init__(self, module: Module):
        self.repeated = 0
        self._module = module
        self._numbers: dict[Hashable, int] = {}
        self._elements: dict[int, tuple[int, ...]] = {}
        self._products: set[tuple[int, str]] = set()

    def number(self, key: Hashable) -> int:
        """The number of what this key says."""
        return self._numbers.setdefault(key, len(self._numbers))

    def run(self, computation: Computation, arguments: Sequence[int]) -> int:
        """Numbers the values of a computation; returns that of its root."""
        values: dict[str, int] = {}
        for each in computation.instructions:
            operands = tuple(values[name] for name in each.operands)
            values[each.name] = self._value(each, operands, arguments)
            if each.opcode in ("dot", "convolution", "multiply", "reduce"):
                self._product(each, values[each.name])
        return values[computation.root.name]

    def _product(self, instruction: Instruction, number: int) -> None:
        found = flops(self._module, instruction)
        if found and (number, instruction.op_name) in self._products:
            self.repeated += found
        self._products.add((number, instruction.op_name))

    def _value(
        self, instruction: Instruction, operands: tuple[int, ...], arguments: Sequence[int]
    ) -> int:
        opcode = instruction.opcode
        if opcode == "parameter":
            return arguments[int(instruction.argument)]
        if opcode in _SAME:
            return operands[0]
        if opcode in ("fusion", "call"):
            return self.run(self._module.callees(instruction)[0], operands)
        if opcode == "tuple":
            number = self.number(("tuple", operands))
            self._elements[number] = operands
            return number
        if opcode == "get-tuple-element" and operands[0] in self._elements:
            return self._elements[operands[0]][int(instruction.attributes["index"])]
        if _OPAQUE.match(opcode):
            return self.number((instruction.computation, instruction.name))
        done = _ABOUT.split(instruction.rest, maxsplit=1)[0]
        argument = instruction.argument if opcode == "constant" else ""
        reducer = tuple(called.root.opcode for called in self._module.callees(instruction))
        shapes = tuple((array.dtype, array.shape) for array in instruction.result)
        return self.number((opcode, shapes, argument, done, reducer, operands))

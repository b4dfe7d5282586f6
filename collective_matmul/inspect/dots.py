"""FLOPs of the products of a compiled program, of the same kind that `bench.flops` counts.

What counts as a product:

- `dot`: `2 m n k`;
- `convolution`, which the TPU compiler makes of every dot. A batch or a head then is a spatial
  dimension with a window over padding; only what meets an element of the input counts;
- a multiplication, and the sum behind it, whose name in the program ends in `dot_general`:
  compilers let the vector unit do a product that has a side of 1;
- a custom call, by the shapes of a library's product or by the cost that it declares.

Places that the compiler computes only to mask them away count: the device computes them.
"""

from __future__ import annotations

from collective_matmul.inspect import kernels
from collective_matmul.inspect.hlo import Instruction, Module
from collective_matmul.inspect.products import contraction, convolution, flops_of_one
from collective_matmul.inspect.sources import origin

RUN_ONCE = ("fusion", "call", "async-start", "fusion-start", "call-start")
"""Opcodes that run the computation which they call, once, as a part of themselves."""

_FLOATING = ("bf", "f", "c")


def flops(module: Module, instruction: Instruction) -> int:
    """FLOPs of the products in an instruction and in what it fuses or calls.

    Args:
      module: the program.
      instruction: any instruction of it. What a loop or a branch inside it runs does not count.

    Returns:
      FLOPs of one run on one device; 0 where there is no product, or one of unknown cost.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in ("dot", "scaled-dot", "ragged-dot"):
        return _dot(module, instruction)
    if opcode == "convolution":
        return _convolution(module, instruction)
    if opcode == "custom-call":
        known = kernels.cost(module, instruction)
        return known.flops if known else 0
    if opcode in ("multiply", "reduce") and instruction.op_name.endswith("dot_general"):
        return _on_vector_unit(module, instruction)
    if instruction.opcode not in RUN_ONCE:
        return 0
    inside = (inner for called in module.callees(instruction) for inner in called.instructions)
    return sum(flops(module, inner) for inner in inside)


def _dot(module: Module, instruction: Instruction) -> int:
    """Of a ragged dot every row counts once, as if all were in one group."""
    lhs = module.operands(instruction)[0].result[0]
    contracted = instruction.attributes.get("lhs_contracting_dims", "{}").strip("{}")
    return contraction(instruction.result[0], lhs, map(int, filter(None, contracted.split(","))))


def _convolution(module: Module, instruction: Instruction) -> int:
    lhs, rhs = (operand.result[0] for operand in module.operands(instruction)[:2])
    attributes = instruction.attributes
    window, labels = attributes.get("window", "{}"), attributes["dim_labels"]
    return convolution(window, labels, lhs, rhs, instruction.result[0])


def _on_vector_unit(module: Module, instruction: Instruction) -> int:
    """Twice what is multiplied: counted at the sum, or at a multiplication without a sum."""
    if not instruction.result[0].dtype.startswith(_FLOATING):
        return 0
    if instruction.opcode == "reduce":
        source = origin(module, module.operands(instruction)[0])
        if source.opcode == "reduce-window":  # the first half of a sum in two steps
            source = origin(module, module.operands(source)[0])
        return _twice(source) if source.opcode == "multiply" else 0
    around = module.computations[instruction.computation].instructions
    summed_here = any(
        other.opcode == "reduce"
        and other.op_name == instruction.op_name
        and origin(module, module.operands(other)[0]) is instruction
        for other in around
    )
    return 0 if summed_here else _twice(instruction)


def _twice(multiplied: Instruction) -> int:
    return flops_of_one(multiplied.result[0]) * multiplied.result[0].size

"""What makes a value, seen through all that only hands it on.

A compiled program passes values through copies, tuples, fusions and calls. `origin` goes back
through these to the instruction that computes the value, or to where it enters: a parameter of the
program, or what a loop or a branch carries.
"""

from __future__ import annotations

from collective_matmul.inspect.hlo import Instruction, Module

_SAME = {
    *("copy", "copy-start", "copy-done", "bitcast", "bitcast-convert", "convert", "reshape"),
    *("reduce-precision", "optimization-barrier", "opt-barrier"),
}
_CALLS = ("fusion", "call")


def origin(module: Module, instruction: Instruction) -> Instruction:
    """The instruction that makes the value of another one.

    Args:
      module: the program.
      instruction: where the value is used or handed on.

    Returns:
      An instruction that is no copy, conversion, fusion or call, in whatever computation it stands;
      a `get-tuple-element` only where the tuple is not made by a `tuple`. The parameter of a
      computation with several callers is where the search ends.
    """
    while True:
        before = _before(module, instruction)
        if before is None:
            return instruction
        instruction = before


def element(module: Module, packed: Instruction, index: int) -> Instruction | None:
    """What makes one element of a tuple; of a bare array, the array is its element 0."""
    source = origin(module, packed)
    if source.opcode == "tuple":
        return module.operands(source)[index]
    return source if index == 0 and len(source.result) == 1 else None


def _before(module: Module, instruction: Instruction) -> Instruction | None:
    """One step back, or None where there is none."""
    opcode = instruction.opcode
    if opcode in _SAME:
        return module.operands(instruction)[0]
    if opcode in _CALLS and instruction.called:
        return module.callees(instruction)[0].root
    if opcode == "parameter":
        callers = module.callers.get(instruction.computation, ())
        if len(callers) == 1 and callers[0].opcode in _CALLS:
            return module.operands(callers[0])[int(instruction.argument)]
    if opcode == "get-tuple-element":
        packed = origin(module, module.operands(instruction)[0])
        if packed.opcode == "tuple":
            return module.operands(packed)[int(instruction.attributes["index"])]
    return None

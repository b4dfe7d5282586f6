"""How often a `while` runs its body.

The compiler writes the number beside many loops. Elsewhere it follows from the counter: where it
starts, what each trip adds to it, and the number that the condition compares it with:

    trips = ceil((bound - start) / step)    while counter < bound

`jax.lax.scan` and `fori_loop` count from 0 in steps of 1. The three numbers may stand behind copies
and inside fusions, and the bound may be carried through the loop unchanged.
"""

from __future__ import annotations

import dataclasses
import re

from collective_matmul.inspect.hlo import Instruction, Module
from collective_matmul.inspect.sources import element, origin

_KNOWN = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class _Value:
    """`carried[index] + offset`, or the number `offset` where index is None."""

    index: int | None
    offset: int


def trips(module: Module, instruction: Instruction) -> int | None:
    """The number of trips of a loop.

    Args:
      module: the program.
      instruction: a `while` of it.

    Returns:
      The number, or None where it cannot be told, for example because it depends on data.
    """
    known = _KNOWN.search(instruction.rest)
    if known:
        return int(known[1])
    condition = module.computations[instruction.attributes["condition"].lstrip("%")]
    compare = origin(module, condition.root)
    direction = compare.attributes.get("direction", "")
    if compare.opcode != "compare" or direction not in _MIRRORED:
        return None
    left, right = (_value(module, operand) for operand in module.operands(compare))
    if left is None or right is None:
        return None
    if _step(module, instruction, left) == 0:
        left, right, direction = right, left, _MIRRORED[direction]
    step, moves = _step(module, instruction, left), _step(module, instruction, right)
    start, bound = _start(module, instruction, left), _start(module, instruction, right)
    if step is None or start is None or bound is None or moves != 0:
        return None
    return _count(direction, start, bound, step)


def _count(direction: str, start: int, bound: int, step: int) -> int | None:
    """Trips until `start + n * step` no longer compares with the bound."""
    if direction in ("GT", "GE"):
        return _count(_MIRRORED[direction], -start, -bound, -step)
    distance = bound - start + (direction == "LE")
    if distance == 0 or (distance < 0 and direction != "NE"):
        return 0
    if step * distance <= 0 or (direction == "NE" and distance % step):
        return None
    return -(-distance // step)


def _step(module: Module, loop: Instruction, value: _Value) -> int | None:
    """What one trip adds to a value; 0 of a constant and of what is carried unchanged."""
    if value.index is None:
        return 0
    body = module.computations[loop.attributes["body"].lstrip("%")]
    after = _element(module, body.root, value.index)
    return after.offset if after is not None and after.index == value.index else None


def _start(module: Module, loop: Instruction, value: _Value) -> int | None:
    """The value when the loop begins."""
    if value.index is None:
        return value.offset
    first = _element(module, module.operands(loop)[0], value.index)
    return None if first is None or first.index is not None else first.offset + value.offset


def _element(module: Module, packed: Instruction, index: int) -> _Value | None:
    """One element of what a loop carries; a loop may also carry a bare array."""
    found = element(module, packed, index)
    return None if found is None else _value(module, found)


def _value(module: Module, instruction: Instruction) -> _Value | None:
    source = origin(module, instruction)
    if source.opcode == "constant":
        number = re.fullmatch(r"\{?(-?\d+)\}?", source.argument.strip())
        return _Value(None, int(number[1])) if number else None
    if source.opcode == "parameter" and len(source.result) == 1:
        return _Value(0, 0)
    if source.opcode == "get-tuple-element":
        packed = origin(module, module.operands(source)[0])
        carried = packed.opcode == "parameter"
        return _Value(int(source.attributes["index"]), 0) if carried else None
    if source.opcode not in ("add", "subtract"):
        return None
    left, right = (_value(module, operand) for operand in module.operands(source))
    if left is None or right is None or None not in (left.index, right.index):
        return None
    if source.opcode == "add":
        index = right.index if left.index is None else left.index
        return _Value(index, left.offset + right.offset)
    return _Value(left.index, left.offset - right.offset) if right.index is None else None

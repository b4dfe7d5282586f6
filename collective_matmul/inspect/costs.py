"""What one instruction costs a device, and how that is known.

    cycles    the compiler's own estimate over the clock (TPU)
    bundles   those of a Pallas kernel's schedule over the clock; or, where they take longer, its
              bytes, or its FLOPs at the peak: a bundle may wait for a matrix unit
    declared  a kernel's cost estimate: FLOPs at the peak, or bytes at the memory's bandwidth, which
              is a lower bound
    FLOPs     its products at the peak for their dtype
    bytes     what it reads and writes in HBM at the memory's bandwidth
    free      by nature: it names, groups or declares values, and moves none
    unknown   nothing of these: it is listed, never silently zero

The compiler's estimate for an instruction without products counts every 16-bit number in HBM as 32
bits; that part of it is taken off again (docs/calibration.md has the evidence).

Between FLOPs and bytes the longer counts. Bytes in on-chip memory count nothing; a slice reads what
it returns, and an update in place writes the update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from collective_matmul import hardware
from collective_matmul.hardware import Chip
from collective_matmul.inspect import kernels
from collective_matmul.inspect.collectives import KINDS
from collective_matmul.inspect.dots import flops
from collective_matmul.inspect.hlo import Computation, Instruction, Module

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "bitcast-convert"),
    *(
        "send",
        "recv",
        "after-all",
        "add-dependency",
        "opt-barrier",
        "partition-id",
        "replica-id",
        "domain",
    ),
}
# What the bytes that it moves do not describe.
NOT_BY_BYTES = {
    *("custom-call", "sort", "fft", "cholesky", "triangular-solve", "topk", "while", "call"),
    *(
        "custom-call-start",
        "call-start",
        "conditional",
        "infeed",
        "outfeed",
        "rng-bit-generator",
        "async-start",
        "async-done",
    ),
}
# Of the HBM bandwidth, what the compiler takes copies of float32 to reach: 0.72 to 0.81, on
# v4, v5e, v5p, v6e and 7x.
STREAM = 0.78
_SLICES = {"slice", "dynamic-slice", "gather"}
_VIEWS = {"bitcast", "reshape", "get-tuple-element"}
DTYPES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "s8": "int8",
    "u8": "uint8",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """One run of one instruction.

    Args:
      seconds: predicted; 0 if `how` is "free" or "unknown".
      flops: of its products, or as a kernel declares.
      bytes: between it and HBM.
      how: see the module.
      peak: FLOP/s of the chip for its products; None: no products, or not published.
    """

    seconds: float
    flops: int
    bytes: int
    how: str
    peak: float | None = None


def cost(
    module: Module,
    instruction: Instruction,
    chip: Chip,
    clock: float | None,
    bundles: Mapping[str, float] | None = None,
) -> Cost:
    """The cost of an instruction that is neither a collective nor a loop.

    Args:
      module: the program.
      instruction: what is costed.
      chip: peaks and bandwidths.
      clock: Hz that the compiler's cycles are divided by; None if there are none to divide.
      bundles: that one run of a Pallas kernel issues, by the name of its instruction.
    """
    if _free(module, instruction):
        return Cost(0.0, 0, 0, "free")
    declared = kernels.cost(module, instruction) if instruction.opcode == "custom-call" else None
    work = declared.flops if declared else flops(module, instruction)
    moved = moved_bytes(module, instruction)
    moved = declared.bytes if declared and declared.bytes else moved
    peak = (_peak(module, instruction, chip) or chip.bf16) if work else None
    by_bytes = moved / chip.hbm_bandwidth
    issued = (bundles or {}).get(instruction.name) if kernels.is_pallas(instruction) else None
    by_flops = work / peak if peak else 0.0
    if issued is not None and clock:
        return Cost(max(issued / clock, by_bytes, by_flops), work, moved, "bundles", peak)
    if instruction.cycles is not None and clock:
        seconds = instruction.cycles / clock
        if not work:
            counted_twice = by_bytes * _narrow(module, instruction) / STREAM
            seconds = min(seconds, max(by_bytes, seconds - counted_twice))
        return Cost(seconds, work, moved, "cycles", peak)
    if declared:
        return Cost(max(by_bytes, by_flops), work, moved, "declared", peak)
    if instruction.opcode in NOT_BY_BYTES and not by_flops:
        return Cost(0.0, work, moved, "unknown", peak)
    return Cost(
        max(by_bytes, by_flops), work, moved, "FLOPs" if by_flops > by_bytes else "bytes", peak
    )


def moved_bytes(module: Module, instruction: Instruction) -> int:
    """Bytes that an instruction reads from HBM and writes to it.

    Args:
      module: the program.
      instruction: any instruction of it.
    """
    operands = module.operands(instruction)
    if instruction.opcode in _SLICES:
        return 2 * _hbm(instruction)
    if instruction.opcode == "dynamic-update-slice" and len(operands) > 1:
        return 2 * operands[1].bytes if _hbm(instruction) else 0
    if instruction.opcode != "fusion":
        return _hbm(instruction) + sum(map(_hbm, operands))
    inside = module.callees(instruction)[0]
    read = 0
    for operand, parameter in zip(operands, inside.parameters, strict=False):
        part = _read(inside, parameter.name)
        read += _hbm(operand) if part is None else min(part, _hbm(operand))
    root = inside.root
    while root.opcode in _VIEWS:
        root = inside.by_name[root.operands[0]]
    if root.opcode == "dynamic-update-slice" and len(root.operands) > 1 and _hbm(instruction):
        return read + inside.by_name[root.operands[1]].bytes
    return read + _hbm(instruction)


def _read(inside: Computation, name: str) -> int | None:
    """Bytes of a value that a fusion looks at: slices of it, nothing where it is updated in place.

    None: all of it.
    """
    total = 0
    for user in inside.instructions:
        if name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == name:
            total += user.bytes
        elif user.opcode in _VIEWS:
            part = _read(inside, user.name)
            if part is None:
                return None
            total += part
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
            return None
    return total


def _hbm(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.result if array.memory == 0)


def _narrow(module: Module, instruction: Instruction) -> float:
    """The share of 16-bit numbers in what an instruction reads and writes in HBM."""
    arrays = [
        array
        for each in (instruction, *module.operands(instruction))
        for array in each.result
        if array.memory == 0
    ]
    narrow = sum(array.bytes for array in arrays if array.dtype in ("bf16", "f16"))
    return narrow / max(1, sum(array.bytes for array in arrays))


def _free(module: Module, instruction: Instruction) -> bool:
    if instruction.opcode == "custom-call":
        return kernels.target(instruction) in kernels.FREE
    if instruction.opcode == "custom-call-start" and not instruction.operands:
        # The first half of a collective, whose data and whose cost come with its update.
        return any(
            x.opcode in KINDS for body in module.callees(instruction) for x in body.instructions
        )
    return instruction.opcode in FREE


def _peak(module: Module, instruction: Instruction, chip: Chip) -> float | None:
    """The chip's rate for the operands of the product that is in an instruction."""
    if instruction.opcode in ("dot", "convolution", "custom-call"):
        operands = module.operands(instruction)[:2]
        dtypes = [array.dtype for operand in operands for array in operand.result]
        rates = [hardware.peak(chip, jnp.dtype(DTYPES[d])) for d in dtypes if d in DTYPES]
        return min((rate for rate in rates if rate), default=None)
    for inside in module.callees(instruction):
        for each in inside.instructions:
            if each.opcode in ("dot", "convolution") or each.called:
                rate = _peak(module, each, chip)
                if rate:
                    return rate
    return None

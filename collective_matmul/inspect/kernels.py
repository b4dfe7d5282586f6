"""What a custom call costs, as far as the program's text says so.

- A Pallas kernel for TPU declares FLOPs and bytes: the `cost_estimate` of `pallas_call`. Its
  time is not in the text, but in the compiler's schedule of the kernel, which `bundles` reads.
- XLA's calls of cuBLAS and cuDNN carry the numbers of the contraction or of the convolution.
- Some calls are no work: they only name memory, or say how it is laid out.

Of every other custom call the cost is not known, which a report has to say.

Reference: https://docs.jax.dev/en/latest/_autosummary/jax.experimental.pallas.CostEstimate.html
"""

from __future__ import annotations

import re
from typing import NamedTuple

from collective_matmul.inspect.hlo import Instruction, Module
from collective_matmul.inspect.products import contraction, convolution

_DECLARED = re.compile(r'"cost_estimate":\s*\{([^}]*)\}')
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
PALLAS = "tpu_custom_call"
FREE = {
    *("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"),
    *("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "LayoutConstraint"),
    *("AssumeGatherIndicesInBound", "annotate_device_placement", "MoveToHost", "MoveToDevice"),
}
# Which of (input, kernel, result) of the forward convolution is the result of the call.
_CUDNN = {
    "__cudnn$convForward": "result",
    "__cudnn$convBiasActivationForward": "result",
    "__cudnn$convBackwardInput": "input",
    "__cudnn$convBackwardFilter": "kernel",
}


class Cost(NamedTuple):
    """What one run of a kernel costs.

    Args:
      flops: of its products, or all that it declares.
      bytes: that it reads and writes in HBM; None where it does not say.
    """

    flops: int
    bytes: int | None = None


def target(instruction: Instruction) -> str:
    """What a custom call calls; empty of any other instruction."""
    return instruction.attributes.get("custom_call_target", "").strip('"')


def is_pallas(instruction: Instruction) -> bool:
    """Whether an instruction is a Pallas kernel for TPU."""
    return instruction.opcode == "custom-call" and target(instruction) == PALLAS


def pallas(module: Module) -> tuple[Instruction, ...]:
    """The Pallas kernels for TPU of a program."""
    return tuple(
        instruction
        for computation in module.computations.values()
        for instruction in computation.instructions
        if is_pallas(instruction)
    )


def cost(module: Module, instruction: Instruction) -> Cost | None:
    """The cost of a custom call, or None where the text does not tell it."""
    name = target(instruction)
    if name in FREE:
        return Cost(0, 0)
    declared = _DECLARED.search(instruction.rest)
    if declared:
        numbers = dict(re.findall(r'"(\w+)":\s*"?(\d+)', declared[1]))
        return Cost(int(numbers.get("flops", 0)), int(numbers.get("bytes_accessed", 0)))
    contracted = _CONTRACTED.search(instruction.rest)
    if contracted and name.startswith("__cublas"):
        lhs = module.operands(instruction)[0].result[0]
        dimensions = map(int, re.findall(r"\d+", contracted[1]))
        return Cost(contraction(instruction.result[0], lhs, dimensions))
    if name in _CUDNN:
        return Cost(_cudnn(module, instruction, _CUDNN[name]))
    return None


def _cudnn(module: Module, instruction: Instruction, role: str) -> int:
    """A gradient has the window and the labels of the convolution that it is the gradient of."""
    first, second = (operand.result[0] for operand in module.operands(instruction)[:2])
    made = instruction.result[0]
    lhs, rhs, out = {
        "result": (first, second, made),
        "input": (made, second, first),
        "kernel": (first, made, second),
    }[role]
    attributes = instruction.attributes
    return convolution(attributes.get("window", "{}"), attributes["dim_labels"], lhs, rhs, out)

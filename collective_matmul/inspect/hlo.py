"""The text of a compiled program as data.

    module -> computations -> instructions, in the order of the text

`jax.jit(f).lower(...).compile().as_text()` is HLO text. Of a scheduled module the order of the text
is the order of issue. Reading is one pass over the lines; what stands behind an instruction's
operands (replica groups, metadata, the compiler's own configuration) is most of the text, and is
taken apart when it is asked for.

Reference: https://openxla.org/xla/operation_semantics
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

from collective_matmul.inspect.tokens import closing, operand_names, split_attributes

_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s%(]+) (?:\(.*)?\{$")
# A kernel's metadata is written over several lines.
_BROKEN = re.compile(r"\n(?=\"|\}\})")
_HEAD = re.compile(r"\s+(ROOT )?%?([^\s%=]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
_MEMORY = re.compile(r"S\((\d+)\)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]")
_AXIS = re.compile(r"'([^']*)'=(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLED = ("calls", "to_apply", "body", "condition", "true_computation", "false_computation")
_CALLED_LISTS = ("branch_computations", "called_computations")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result.

    Args:
      dtype: as HLO writes it: `bf16`, `pred`, `f8e4m3fn`, `token`.
      shape: elements along each dimension; of a dynamic dimension the bound.
      memory: the memory space that it lies in: 0 is HBM (or a host's memory), others are on chip.
    """

    dtype: str
    shape: tuple[int, ...]
    memory: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes without the padding of a layout; 0 of a token and the like."""
        bits = 8 if self.dtype == "pred" else re.match(r"[a-z]+(\d+)", self.dtype)
        width = bits if isinstance(bits, int) else int(bits[1]) if bits else 0
        return -(-self.size * width // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Args:
      name: its name, without the per cent sign.
      opcode: `fusion`, `collective-permute-start` and so on.
      result: the arrays of the result; nested tuples are flattened.
      operands: the names of the operands, without the per cent sign.
      argument: the text between the parentheses: a parameter's number, a constant's value.
      rest: the text behind the operands, which `attributes` takes apart.
      is_root: it is what its computation returns.
      computation: the name of the computation that it stands in.
    """

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    argument: str = ""
    rest: str = dataclasses.field(default="", repr=False)
    is_root: bool = False
    computation: str = ""

    @functools.cached_property
    def attributes(self) -> Mapping[str, str]:
        """The attributes and their text, for example `{"direction": "LT"}`."""
        return dict(split_attributes(self.rest))

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it names: fused, called, applied, body, condition, branches."""
        found = [self.attributes[key].lstrip("%") for key in _CALLED if key in self.attributes]
        for key in _CALLED_LISTS:
            found += operand_names(self.attributes.get(key, "{}")[1:-1])
        return tuple(dict.fromkeys(found))

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate for one run, in clock cycles; None where it gives none."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else None

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the user's program it comes from; empty where the text does not say."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(array.bytes for array in self.result)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order of the text."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """The instructions by their names."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """The parameters, in their order."""
        found = [each for each in self.instructions if each.opcode == "parameter"]
        return tuple(sorted(found, key=lambda each: int(each.argument)))

    @functools.cached_property
    def root(self) -> Instruction:
        """What it returns."""
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Args:
      name: its name.
      computations: by name.
      entry: the name of the one that runs.
      scheduled: whether the order of the text is the order of issue.
      partitions: devices that share the work, each of which runs this text.
      replicas: copies of that, for example of `jax.pmap`.
      mesh: sizes of the mesh axes where the text tells them (jax 0.12 on), else empty.
    """

    name: str
    computations: Mapping[str, Computation]
    entry: str
    scheduled: bool
    partitions: int = 1
    replicas: int = 1
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def main(self) -> Computation:
        """The computation that runs."""
        return self.computations[self.entry]

    @functools.cached_property
    def callers(self) -> Mapping[str, tuple[Instruction, ...]]:
        """The instructions that name a computation."""
        found: dict[str, tuple[Instruction, ...]] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions:
                for name in instruction.called:
                    found[name] = (*found.get(name, ()), instruction)
        return found

    def operands(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """The instructions whose results an instruction reads."""
        around = self.computations[instruction.computation].by_name
        return tuple(around[name] for name in instruction.operands)

    def callees(self, instruction: Instruction) -> tuple[Computation, ...]:
        """The computations that an instruction names."""
        return tuple(self.computations[name] for name in instruction.called)


def parse(text: str) -> Module:
    """Reads HLO text.

    Args:
      text: what `as_text()` of a compiled or lowered program returns in its HLO dialect.

    Returns:
      The module.

    Raises:
      ValueError: the text is not HLO, or no computation in it is the entry.
    """
    head, _, lines = text.partition("\n")
    if not head.startswith("HloModule"):
        raise ValueError(
            f"this is not HLO text: it begins with {head[:40]!r} instead of 'HloModule'; pass "
            "the compiled program, or its as_text()"
        )
    computations: dict[str, Computation] = {}
    entry = name = None
    body: list[Instruction] = []
    for line in _BROKEN.sub("", lines).split("\n"):
        if line[:1] == " ":
            if name is not None and (instruction := _instruction(line, name)):
                body.append(instruction)
        elif line[:1] == "}" and name is not None:
            computations[name] = Computation(name, tuple(body))
            name, body = None, []
        elif line[-1:] == "{" and (found := _COMPUTATION.match(line)):
            name = found[2]
            entry = name if found[1] else entry
    if entry is None:
        raise ValueError(f"none of the {len(computations)} computations of the text is ENTRY")
    return Module(
        name=re.split(r"[\s,]+", head)[1],
        computations=computations,
        entry=entry,
        scheduled="is_scheduled=true" in head,
        partitions=_number("num_partitions", head),
        replicas=_number("replica_count", head),
        mesh=_mesh(text),
    )


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type such as `(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, u32[])`, flattened."""
    return tuple(_array(*found) for found in _ARRAY.findall(text))


@functools.cache
def _array(dtype: str, shape: str, layout: str) -> Array:
    memory = _MEMORY.search(layout)
    sizes = tuple(int(size.strip().lstrip("<=")) for size in shape.split(",") if size.strip())
    return Array(dtype, sizes, int(memory[1]) if memory else 0)


def _instruction(line: str, computation: str) -> Instruction | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    root, name, result, opcode = head.groups()
    start = head.end()
    end = closing(line, start)
    argument = line[start:end]
    operands = () if opcode in ("constant", "parameter") else operand_names(argument)
    return Instruction(
        name=name,
        opcode=opcode,
        result=arrays(result),
        operands=operands,
        argument=argument,
        rest=line[end + 1 :],
        is_root=root is not None,
        computation=computation,
    )


def _mesh(text: str) -> dict[str, int]:
    """The user's mesh. The compiler also makes up meshes, of axes called axis_0, axis_1 and on."""
    for found in _MESH.finditer(text):
        axes = {axis: int(size) for axis, size in _AXIS.findall(found[1])}
        if any(axis != f"axis_{number}" for number, axis in enumerate(axes)):
            return axes
    return {}


def _number(key: str, head: str) -> int:
    found = re.search(rf"\b{key}=(\d+)", head)
    return int(found[1]) if found else 1

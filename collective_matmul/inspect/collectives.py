"""The collectives of a compiled program, and what begins and ends each transfer.

A collective runs in one of these ways, all of which `collective` understands:

- synchronous: `all-reduce(...)`, or alone in a fusion;
- in two halves: `all-gather-start` and `-done`, `async-start` with the collective in the
  computation that it calls, `send` and `send-done`;
- on another core: a `custom-call-start`, which gets its data from a `custom-call-update`;
- as the TPU compiler's asynchronous fusions: a fusion that ends in the call `AsyncCollectiveStart`,
  then fusions that compute and carry a piece of it, then one that ends in `AsyncCollectiveDone`.

An asynchronous collective stands at the instruction that hands over the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from collective_matmul.inspect.groups import Groups, groups, pairs
from collective_matmul.inspect.hlo import Computation, Instruction, Module
from collective_matmul.inspect.sources import origin

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
"""Opcodes; `send` has the kind `send-recv`."""

_PAIRS = "_xla_send_recv_source_target_pairs="
_CALLS = (
    *("fusion", "async-start", "fusion-start", "call-start"),
    *("custom-call", "custom-call-start", "custom-call-update"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """What a collective moves, and between whom.

    Args:
      kind: one of `KINDS`, or `send-recv`.
      shard_bytes: what one device puts in: of an all-gather its shard, of a reduce-scatter,
        all-reduce or all-to-all its whole operand, of a permute what it sends. Bytes.
      pairs: (from, to) of a permute, as numbers of partitions.
      groups: of the others, the partitions that exchange among themselves.
      asynchronous: other instructions run while it is under way.
    """

    kind: str
    shard_bytes: int
    pairs: Groups = ()
    groups: Groups = ()
    asynchronous: bool = False

    @property
    def size(self) -> int:
        """Devices in the largest group; of a permute 2."""
        return max(map(len, self.groups), default=2 if self.pairs else 1)


@dataclasses.dataclass(frozen=True)
class Copy:
    """A transfer between the memories of one chip, asynchronous.

    Args:
      bytes: what it moves.
      source: memory space that it reads; 0 is HBM.
      target: memory space that it writes.
    """

    bytes: int
    source: int
    target: int


def wire_bytes(collective: Collective) -> int:
    """Bytes that one device sends.

    With t devices in a group and S = `shard_bytes`, of bandwidth-optimal algorithms:

        all-gather (t-1) S     reduce-scatter, all-to-all (t-1)/t S     all-reduce 2 (t-1)/t S

    In a permute a device that takes part sends S; so does the root of a broadcast.

    Reference: R. Thakur et al., Optimization of Collective Communication Operations in MPICH, 2005.
    """
    t, shard = collective.size, collective.shard_bytes
    if collective.pairs:
        return shard if any(a != b for a, b in collective.pairs) else 0
    if collective.kind == "all-gather":
        return (t - 1) * shard
    if collective.kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return (t - 1) * shard // t
    if collective.kind == "all-reduce":
        return 2 * (t - 1) * shard // t
    return shard if t > 1 else 0


def collective(module: Module, instruction: Instruction) -> Collective | None:
    """The collective that an instruction runs, or begins.

    Args:
      module: the program.
      instruction: any instruction of it.

    Returns:
      The collective; None of an instruction that is none, that ends or carries on one begun
      elsewhere, or that receives what another one sends.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        return _read(module, instruction, kind, kind != instruction.opcode)
    if instruction.opcode == "send":
        text = instruction.rest.partition(_PAIRS)[2].partition("}}")[0]
        data = module.operands(instruction)[0]
        return Collective("send-recv", data.bytes, pairs=pairs(text + "}}"), asynchronous=True)
    if instruction.opcode not in _CALLS or not instruction.operands:
        return None
    begun = instruction
    if instruction.opcode == "custom-call-update":
        begun = module.operands(instruction)[0]
    inner = list(_inside(module, begun))
    starts = _holds(module, begun, "AsyncCollectiveStart")
    if not inner or ("async_collective_fusion_config" in inner[0].rest and not starts):
        return None
    asynchronous = starts or instruction.opcode not in ("fusion", "custom-call")
    found = [_read(module, each, _kind(module, each), asynchronous) for each in inner]
    return dataclasses.replace(found[0], shard_bytes=sum(each.shard_bytes for each in found))


def copy(module: Module, instruction: Instruction) -> Copy | None:
    """The transfer between memories that a `copy-start` or `slice-start` begins, else None."""
    if instruction.opcode not in ("copy-start", "slice-start", "dynamic-slice-start"):
        return None
    source = module.operands(instruction)[0].result[0]
    # copy-start returns (target, source, context), the others ((operands), target, context).
    before = 0 if instruction.opcode == "copy-start" else len(instruction.operands)
    target = instruction.result[before]
    return Copy(target.bytes, source.memory, target.memory)


def start_of(module: Module, computation: Computation) -> Mapping[str, str]:
    """The beginning of everything asynchronous that ends in a computation.

    Args:
      module: the program.
      computation: one of its computations.

    Returns:
      {name of the instruction that ends it: name of the one that begins it}, of collectives, copies
      and whatever else runs asynchronously. What began elsewhere, for example before a loop that
      it ends in, is in `unmatched` instead.
    """
    found = {done: _beginning(module, done) for done in _dones(module, computation)}
    return {
        done.name: start.name
        for done, start in found.items()
        if start is not None and start.computation == computation.name
    }


def unmatched(module: Module, computation: Computation) -> tuple[str, ...]:
    """Names of what ends here and began elsewhere, or begins here and ends elsewhere."""
    matched = start_of(module, computation)
    ends = [done.name for done in _dones(module, computation) if done.name not in matched]
    begun = set(matched.values())
    starts = [
        each.name
        for each in computation.instructions
        if each.name not in begun and _starts(module, each)
    ]
    return (*ends, *starts)


def _read(module: Module, instruction: Instruction, kind: str, asynchronous: bool) -> Collective:
    attributes = instruction.attributes
    operands = module.operands(instruction)
    if "slice_sizes" in attributes:  # a permute into a given buffer: (source, target, places)
        operands = operands[:1]
    shard_bytes = sum(operand.bytes for operand in operands)
    if kind == "collective-permute":
        moved = pairs(attributes.get("source_target_pairs", "{}"))
        return Collective(kind, shard_bytes, pairs=moved, asynchronous=asynchronous)
    members = attributes.get("replica_groups", "{}")
    if "device_ids" in attributes:
        members += ", device_ids=" + attributes["device_ids"]
    among = groups(members, module.partitions * module.replicas)
    return Collective(kind, shard_bytes, groups=among, asynchronous=asynchronous)


def _inside(module: Module, instruction: Instruction) -> Iterator[Instruction]:
    """The collectives in what an instruction calls."""
    for computation in module.callees(instruction):
        for inner in computation.instructions:
            if inner.opcode in KINDS:
                yield inner
            elif inner.opcode in _CALLS:
                yield from _inside(module, inner)


def _kind(module: Module, inner: Instruction) -> str:
    """The TPU compiler writes a reduce-scatter as an all-reduce of which a slice is kept."""
    around = module.computations[inner.computation].instructions
    sliced = any(
        each.opcode == "dynamic-slice" and each.operands[0] == inner.name for each in around
    )
    return "reduce-scatter" if inner.opcode == "all-reduce" and sliced else inner.opcode


def _holds(module: Module, instruction: Instruction, target: str) -> bool:
    """Whether a fusion makes this custom call."""
    return instruction.opcode == "fusion" and any(
        inner.opcode == "custom-call" and inner.attributes["custom_call_target"] == f'"{target}"'
        for computation in module.callees(instruction)
        for inner in computation.instructions
    )


def _dones(module: Module, computation: Computation) -> list[Instruction]:
    return [
        each
        for each in computation.instructions
        if each.opcode.endswith("-done") or _holds(module, each, "AsyncCollectiveDone")
    ]


def _starts(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction hands over the data of something asynchronous."""
    opcode = instruction.opcode
    if opcode.endswith("-update"):
        return len(instruction.operands) > 1
    if opcode.endswith("-start"):
        return bool(instruction.operands)
    return opcode in ("send", "recv") or _holds(module, instruction, "AsyncCollectiveStart")


def _beginning(module: Module, done: Instruction) -> Instruction | None:
    here = module.operands(done)[0]
    while not _starts(module, here):
        before = origin(module, here)
        if before is here:
            if here.opcode != "get-tuple-element" and not here.opcode.endswith("-update"):
                return None
            before = module.operands(here)[0]
        here = before
    return here

"""What a schedule puts beside each permute: the compute between its start and its done.

A hop is hidden if that compute takes at least the hop's own time on the wire. Where it takes less,
the schedule's data flow can say why: only compute that the hop does not wait for, and that does not
wait for the hop, could have stood there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from collective_matmul.inspect.collectives import collective, start_of
from collective_matmul.inspect.costs import cost
from collective_matmul.inspect.hlo import Instruction, Module
from collective_matmul.inspect.network import Network

SMALL = 0.05  # of a hop: compute that is shorter does not count as something to hide it under


@dataclasses.dataclass(frozen=True)
class Window:
    """One permute of a schedule; times in seconds, predicted.

    Args:
      start, done: names of its two halves.
      wire: its own time on the links, were it alone there.
      compute: between its start and its done.
      free: names of the compute of the whole program that neither waits for it nor is waited for,
        without what is too short to matter.
      idle: those of them that no permute at all waits for.
      before: names of the permutes that end before this one can start.
    """

    start: str
    done: str
    wire: float
    compute: float
    free: frozenset[str]
    idle: frozenset[str]
    before: frozenset[str]

    @property
    def holds(self) -> bool:
        """Whether the compute takes as long as the hop."""
        return self.compute >= self.wire


def windows(module: Module, network: Network) -> tuple[Window, ...]:
    """The permutes of the entry computation, in the order in which they start.

    Args:
      module: a scheduled program.
      network: where its devices stand.
    """
    main = module.main
    operands = {each.name: each.operands for each in main.instructions}
    users: dict[str, list[str]] = {}
    for name, used in operands.items():
        for operand in used:
            users.setdefault(operand, []).append(name)
    seconds = {each.name: _seconds(module, each, network) for each in main.instructions}
    place = {each.name: i for i, each in enumerate(main.instructions)}
    pairs = {
        done: start
        for done, start in start_of(module, main).items()
        if main.by_name[start].opcode == "collective-permute-start"
    }
    above = {start: _reach(start, operands) for start in pairs.values()}
    awaited = frozenset().union(*above.values())
    found = []
    for done, start in pairs.items():
        moved = collective(module, main.by_name[start])
        assert moved is not None
        wire = network.traffic(moved).seconds
        below = _reach(done, users)
        between = main.instructions[place[start] : place[done]]
        free = {
            name
            for name, taken in seconds.items()
            if taken > SMALL * wire and name not in above[start] and name not in below
        }
        found.append(
            Window(
                start=start,
                done=done,
                wire=wire,
                compute=sum(seconds[each.name] for each in between),
                free=frozenset(free),
                idle=frozenset(free - awaited),
                before=frozenset(above[start] & set(pairs)),
            )
        )
    return tuple(sorted(found, key=lambda window: place[window.start]))


def surely_exposed(hops: Iterable[Window]) -> int:
    """How many of these hops no order of the same instructions could hide.

    Two counts, of which the larger is taken. Of hops one after the other, each needs compute of
    its own: with `f` computations that are free beside any of a chain of `c` hops, `c - f` stay
    exposed. And if all that is free beside any hop is awaited by another one, then the hop that
    starts last, whichever it is, has nothing to hide under.

    Args:
      hops: of one program.
    """
    hops = list(hops)
    chain = [x for x in hops if any(x.done in y.before for y in hops) or x.before]
    in_a_row = len({len(x.before) for x in chain}) == len(chain)
    free = frozenset().union(*(x.free for x in chain))
    by_chain = len(chain) - len(free) if in_a_row else 0
    return max(0, by_chain, int(bool(hops) and not any(x.idle for x in hops)))


def _seconds(module: Module, instruction: Instruction, network: Network) -> float:
    if collective(module, instruction) is not None or instruction.opcode.endswith("-done"):
        return 0.0
    if instruction.opcode.endswith("-start"):
        return 0.0
    return cost(module, instruction, network.chip, network.chip.clock).seconds


def _reach(name: str, following: Mapping[str, Iterable[str]]) -> set[str]:
    """Everything that can be reached from `name`."""
    seen: set[str] = set()
    ahead = [name]
    while ahead:
        for each in following.get(ahead.pop(), ()):
            if each not in seen:
                seen.add(each)
                ahead.append(each)
    return seen

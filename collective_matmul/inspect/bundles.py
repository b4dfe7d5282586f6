"""What a Pallas kernel takes on a TPU: the bundles of its final schedule.

A TPU core issues one bundle of instructions a cycle, and the TPU compiler writes its last schedule
as text, one bundle a line:

    kernel = prologue + trips x (bundles of the loop) + epilogue        loops within loops multiply

Of every loop the text tells where it begins (LB), which branch goes back, and the test before that
branch; the trips follow from the counter, as in `trips`:

    trips = ceil((bound - start) / step)

What is behind a predicate counts as if it ran, a `pl.when` or the first and the last step of a
pipeline, so that this is an upper bound of what is issued. Waiting for memory is not in a schedule.
The one or two bundles behind a branch that every trip issues too count once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*>*\s*\{")
_STARTS = re.compile(r"Start region (\d+)")
_BRANCH = re.compile(r"sbr\.rel (?:\((!?)(%\w+)\) )?target = \$region(\d+)")
_DEFINED = re.compile(r"(%\w+) = ([a-z][\w.]*) (?:\(!?%\w+\), )?([^;/}]*)")
_SPILLED = re.compile(r"(\[smem:\[#\w+\]\]) (%\w+)$")
_PREDICATED = re.compile(r"\s+\(!?%\w+\)$")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a kernel.

    Args:
      first, last: the places of its first bundle and of its branch, from 0.
      trips: how often it runs each time that it is reached; None: the text does not tell.
    """

    first: int
    last: int
    trips: int | None

    @property
    def bundles(self) -> int:
        """Of one trip, with every loop in it once."""
        return self.last - self.first + 1


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The final schedule of a kernel.

    Args:
      bundles: in the text.
      loops: in the order of their branches, so that an inner one comes before the outer.
      why: what is unknown, so that there is no number of cycles; empty if nothing is.
    """

    bundles: int
    loops: tuple[Loop, ...]
    why: str = ""

    @property
    def cycles(self) -> int | None:
        """Bundles that one core issues in a run; None if the trips of a loop are not known."""
        if self.why:
            return None
        return self.bundles + sum(
            loop.bundles * ((loop.trips or 0) - 1) * self._around(loop) for loop in self.loops
        )

    def _around(self, loop: Loop) -> int:
        """How often a loop is reached."""
        return math.prod(
            outer.trips or 0
            for outer in self.loops
            if outer != loop and outer.first <= loop.first and loop.last <= outer.last
        )


def parse(text: str) -> Schedule:
    """Reads what the TPU compiler writes as `final_bundles`.

    Args:
      text: of one kernel.

    Returns:
      Its schedule. `why` says what the text does not tell: where a loop ends, or how often it runs.

    Raises:
      ValueError: if there is no bundle in the text.
    """
    labels, bodies = _bundles(text)
    if not bodies:
        raise ValueError("no line of this text is a bundle: it is not a final schedule")
    begins = {
        int(region): place
        for place, (label, body) in enumerate(zip(labels, bodies, strict=True))
        if label == "LB"
        for region in _STARTS.findall(body)
    }
    values = _Values([_COMMENT.sub("", body) for body in bodies])
    loops = []
    for place, body in enumerate(bodies):
        for negated, predicate, region in _BRANCH.findall(body):
            first = begins.get(int(region), len(bodies))
            if first <= place:
                trips = values.trips(predicate) if negated else None
                loops.append(Loop(first, place, trips))
    return Schedule(len(bodies), tuple(loops), _unknown(labels, loops))


def _bundles(text: str) -> tuple[list[str], list[str]]:
    """The label and the text of every bundle; a comment in one may go over many lines."""
    labels: list[str] = []
    bodies: list[str] = []
    for line in text.splitlines():
        found = _BUNDLE.match(line)
        if found:
            labels.append(found[2] or "")
            bodies.append(line[found.end() :])
        elif bodies:
            bodies[-1] += f"\n{line}"
    return labels, bodies


def _unknown(labels: Sequence[str], loops: Sequence[Loop]) -> str:
    heads = {place for place, label in enumerate(labels) if label == "LB"}
    lost = heads - {loop.first for loop in loops}
    if lost:
        return f"where the loop at bundle {min(lost):#x} ends"
    crossed = [
        a for a in loops for b in loops if a.first < b.first <= a.last < b.last or _twins(a, b)
    ]
    if crossed:
        return f"how the loops at bundle {crossed[0].first:#x} lie in one another"
    endless = [loop for loop in loops if loop.trips is None]
    return f"how often the loop at bundle {endless[0].first:#x} runs" if endless else ""


def _twins(a: Loop, b: Loop) -> bool:
    return a is not b and (a.first, a.last) == (b.first, b.last)


class _Values:
    """Which scalar is what: every name is given a value in one place.

    A place that values are spilled to may hold several in turn: a load gets what the nearest store
    before it in the text has left, or at the top of a loop, the last one of the trip before.
    """

    def __init__(self, bodies: Sequence[str]):
        self._given: dict[str, list[tuple[str, str]]] = {}
        self._loaded: dict[str, int] = {}  # in which bundle
        self._kept: dict[str, list[tuple[int, str]]] = {}
        for place, body in enumerate(bodies):
            for operation in body.split(";;"):
                found = _DEFINED.search(operation)
                if found is None:
                    continue
                name, code, operands = found[1], found[2], _PREDICATED.sub("", found[3].strip())
                spilled = _SPILLED.search(operands) if code == "sst" else None
                if spilled:
                    self._kept.setdefault(spilled[1], []).append((place, spilled[2]))
                else:
                    self._loaded[name] = place
                    self._given.setdefault(name, []).append((code, operands))

    def trips(self, predicate: str) -> int | None:
        """Of the loop that ends when `predicate` is true; None where it cannot be told."""
        code, operands = self._one(predicate)
        if code != "scmp.ge.s32.totalorder" or len(operands) != 2:
            return None
        bound = self._constant(operands[1])
        counted = self._counter(operands[0])
        if bound is None or counted is None:
            return None
        start, step = counted
        return max(1, math.ceil((bound - start) / step))

    def _counter(self, name: str) -> tuple[int, int] | None:
        """Where a counter starts, and what each trip adds; `name` is what it is after a trip."""
        name = self._source(name)
        code, operands = self._one(name)
        if code != "sadd.s32" or len(operands) != 2:
            return None
        steps = [step for each in operands if (step := self._constant(each)) is not None]
        phis = [self._source(each) for each in operands if each.startswith("%")]
        phis = [each for each in phis if self._one(each)[0] == "sphi"]
        if len(steps) != 1 or len(phis) != 1 or steps[0] <= 0:
            return None
        first, after = self._one(phis[0])[1]
        start = self._constant(first)
        if start is None or self._source(after) != name:
            return None
        return start, steps[0]

    def _constant(self, operand: str) -> int | None:
        if operand.startswith("%"):
            code, operands = self._one(self._source(operand))
            operand = operands[0] if code == "smov.u32" and len(operands) == 1 else ""
        if not re.fullmatch(r"\d+", operand):
            return None
        number = int(operand)
        return number - 2**32 if number >= 2**31 else number

    def _source(self, name: str) -> str:
        """The name that a value had before it was copied or spilled."""
        for _ in range(len(self._given)):
            code, operands = self._one(name)
            source = self._spilled(name, operands[0]) if code == "sld" else None
            source = operands[0] if code == "smov.u32" and len(operands) == 1 else source
            if source is None or not source.startswith("%"):
                break
            name = source
        return name

    def _spilled(self, name: str, place: str) -> str | None:
        """What was stored there when a name was loaded from it."""
        stored = self._kept.get(place, [])
        before = [x for x in stored if x[0] < self._loaded[name]]
        return max(before or stored)[1] if stored else None

    def _one(self, name: str) -> tuple[str, tuple[str, ...]]:
        """The instruction that gives a name its value, or nothing where two do."""
        given = self._given.get(name, [])
        if len(given) != 1:
            return "", ()
        code, operands = given[0]
        return code, tuple(each.strip() for each in operands.split(","))

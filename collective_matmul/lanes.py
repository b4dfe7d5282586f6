"""Schedules as data: which piece of a shard moves how far, and how often.

`t` devices stand on a ring, each with one shard. A `Lane` says: *this part of every shard moves
`shift` devices, `hops` times*. After `h` hops of a lane, device `i` holds the lane's part of the
shard that device `i - shift * h` began with. A schedule is a tuple of lanes. A gather walks its
lanes forwards: chunks arrive. A scatter walks them backwards: sums leave, and come home last.
Because a schedule is plain data, its correctness is a property of integers, checked without arrays.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Part:
    """Piece `index` of `count` nearly equal pieces of a shard, in order."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"a part needs 0 <= index < count, got {self.index} of {self.count}")

    def bounds(self, size: int) -> tuple[int, int]:
        """First and one-past-last row of the part in a shard of `size` rows; pieces tile it."""
        return size * self.index // self.count, size * (self.index + 1) // self.count


WHOLE = Part()


@dataclasses.dataclass(frozen=True)
class Lane:
    """`part` of every shard moves `shift` devices along the ring, `hops` times."""

    shift: int
    hops: int
    part: Part = WHOLE


def steps(lanes: tuple[Lane, ...]) -> int:
    """Rounds of the schedule: lanes hop side by side, so the longest one counts."""
    return max((lane.hops for lane in lanes), default=0)


def parts(lanes: tuple[Lane, ...]) -> tuple[Part, ...]:
    """The pieces into which the schedule cuts each shard, in order."""
    return tuple(sorted({lane.part for lane in lanes} or {WHOLE}, key=lambda part: part.index))


def rounds(lanes: tuple[Lane, ...]) -> Iterator[tuple[int, list[int]]]:
    """Yields `(hop, indices of the lanes that make it)` for hop = 1 .. steps."""
    for hop in range(1, steps(lanes) + 1):
        yield hop, [i for i, lane in enumerate(lanes) if lane.hops >= hop]


def permutation(shift: int, t: int) -> list[tuple[int, int]]:
    """`(source, destination)` pairs that move every device's data by `shift` devices."""
    return [(i, (i + shift) % t) for i in range(t)]


def check_covering(lanes: tuple[Lane, ...], t: int) -> None:
    """Checks that every part of every other device's shard is visited exactly once.

    Raises:
      ValueError: naming the first offsets and parts that are missed or visited twice, or the cuts
        that differ between lanes (every lane of a schedule must cut the shard alike).
    """
    counts = {lane.part.count for lane in lanes}
    if len(counts) > 1:
        raise ValueError(
            f"lanes cut the shard into {sorted(counts)} pieces; a schedule has one cut"
        )
    visits = Counter(
        (lane.shift * hop % t, lane.part.index) for lane in lanes for hop in range(1, lane.hops + 1)
    )
    wanted = {(offset, piece) for offset in range(1, t) for piece in range(max(counts, default=1))}
    wrong = [
        f"piece {piece} at offset {offset}: {visits[offset, piece]} visits"
        for offset, piece in sorted(wanted | set(visits))
        if visits[offset, piece] != int((offset, piece) in wanted)
    ]
    if wrong:
        raise ValueError(f"the lanes do not cover t={t} devices: " + "; ".join(wrong[:4]))


def link_load(lanes: tuple[Lane, ...], t: int, hop: int) -> tuple[float, float]:
    """Shards that cross each ring link in round `hop`, `(forwards, backwards)`.

    A shift of `s` crosses `s` links forwards or `t - s` backwards, whichever is shorter: the load
    that a physical ring sees. On a switch every lane has a path of its own, one part each.
    """
    forwards = backwards = 0.0
    for lane in lanes:
        if lane.hops >= hop:
            share = 1 / lane.part.count
            ahead = lane.shift % t
            if ahead <= t - ahead:
                forwards += share * ahead
            else:
                backwards += share * (t - ahead)
    return forwards, backwards

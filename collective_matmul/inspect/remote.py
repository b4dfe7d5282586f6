"""Kernels that send to other devices themselves: what they send when, as they tell it.

A program's text has no transfers of such a kernel. Ours (`backends/pallas_tpu`) tell in their
metadata along which axes and lanes they talk, in how many panels and tiles they multiply, and how
many bytes a hop carries; so the run of one can be played, product by product and hop by hop:

    gather    a round's last tile waits for the next round's rows, which are sent on there
    scatter   a tile waits for the sum of the same tile, which the round before has sent, and for
              those of the tiles after it that share its semaphore
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from collective_matmul.inspect.collectives import Collective
from collective_matmul.inspect.hlo import Instruction
from collective_matmul.inspect.network import Network

_METADATA = "kernel_metadata="
Hop = tuple[int, int, int]  # lane, round, tile


@dataclasses.dataclass(frozen=True)
class Lane:
    """As `collective_matmul.lanes.Lane`, with the bytes of a hop instead of a part."""

    shift: int
    hops: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a kernel tells.

    Args:
      kind: "gather" or "scatter".
      axes: of the mesh, along which it talks.
      lanes: what moves.
      turns: tiles that a round is worked on in.
      together: as many tiles' sums are waited for at once.
      carried: what a scatter moves besides, as a gather.
    """

    kind: str
    axes: tuple[str, ...]
    lanes: tuple[Lane, ...]
    turns: int
    together: int = 1
    carried: tuple[Lane, ...] = ()

    @property
    def rounds(self) -> int:
        """Of hops; there is one more of products."""
        return max(lane.hops for lane in self.lanes)

    @property
    def pieces(self) -> int:
        """In which a hop is sent."""
        return self.turns if self.kind == "scatter" else 1

    def collectives(self, network: Network) -> list[Collective]:
        """A piece of each lane's hop as a permute, and a hop of each that is carried."""
        ahead = 1 if self.kind == "gather" else -1
        own = [_permute(self.axes, x, ahead, self.pieces, network) for x in self.lanes]
        return own + [_permute(self.axes, x, 1, 1, network) for x in self.carried]

    def steps(self) -> Iterator[tuple[str, Any]]:
        """What the kernel does, in order: ("send", hop), ("wait", hop) or ("work", its share)."""
        share = 1 / (self.rounds + 1) / self.turns
        return self._gather(share) if self.kind == "gather" else self._scatter(share)

    def _gather(self, share: float) -> Iterator[tuple[str, Any]]:
        yield from self._all("send", 1)
        for h in range(self.rounds + 1):
            yield "work", share * (self.turns - 1)
            yield from self._all("wait", h + 1)
            yield from self._all("send", h + 2)
            yield "work", share

    def _scatter(self, share: float) -> Iterator[tuple[str, Any]]:
        for h in range(self.rounds, -1, -1):
            yield from self._carry("wait", self.rounds - h)
            yield from self._carry("send", self.rounds - h + 1)
            for tile in range(self.turns):
                if tile % self.together == 0:
                    for each in range(tile, min(tile + self.together, self.turns)):
                        yield from self._all("wait", h + 1, each)
                yield "work", share
                if h:
                    yield from self._all("send", h, tile)

    def _carry(self, what: str, h: int) -> Iterator[tuple[str, Hop]]:
        for i, lane in enumerate(self.carried):
            if 1 <= h <= lane.hops:
                yield what, (len(self.lanes) + i, h, 0)

    def _all(self, what: str, h: int, tile: int = 0) -> Iterator[tuple[str, Hop]]:
        for i, lane in enumerate(self.lanes):
            if h <= lane.hops:
                yield what, (i, h, tile)


def _permute(
    axes: Sequence[str], lane: Lane, ahead: int, pieces: int, network: Network
) -> Collective:
    sizes = [network.axes[name] for name in axes]
    places = [list(network.axes).index(name) for name in axes]
    here = np.ravel_multi_index(tuple(network.indices[:, places].T), sizes)
    there = np.stack(np.unravel_index((here + ahead * lane.shift) % np.prod(sizes), sizes), 1)
    peers = network.indices.copy()
    peers[:, places] = there
    targets = np.ravel_multi_index(tuple(peers.T), [*network.axes.values()])
    pairs = tuple((i, int(target)) for i, target in enumerate(targets))
    share = lane.bytes // pieces
    return Collective("collective-permute", share, pairs=pairs, asynchronous=True)


def schedule(instruction: Instruction) -> Schedule | None:
    """What a Pallas kernel tells of its hops, or None if it tells nothing.

    Args:
      instruction: any.
    """
    _, found, text = instruction.attributes.get("frontend_attributes", "").partition(_METADATA)
    if not found:
        return None
    told, _ = json.JSONDecoder(strict=False).raw_decode(text)
    if "collective" not in told:
        return None
    known = json.loads(told["collective"])
    return Schedule(
        known["kind"],
        tuple(known["axes"]),
        tuple(Lane(*lane) for lane in known["lanes"]),
        known["blocks"] * known["tiles"],
        known.get("together", 1),
        tuple(Lane(*lane) for lane in known.get("carried", ())),
    )

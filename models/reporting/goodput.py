"""Where the time of a run went, over all its attempts, and how much of it was not in vain.

    goodput = seconds of training in steps that were kept / seconds since the run first began

An attempt that is killed leaves steps that no checkpoint has: the next attempt makes them again,
and their time counts as lost, as does the time between the two. Each line of `ledger.jsonl` is what
one attempt spent so far, so that a kill loses what came after its last line and no more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from models.reporting.metrics import read

EVERY = 5.0  # seconds from one line to the next, at least, where nothing else asks for one
KINDS = ("start", "restore", "compile", "data", "evaluate", "save")  # the rest is training


@dataclasses.dataclass(frozen=True)
class Goodput:
    """A run's time.

    Args:
      wall: seconds from the first beginning until now.
      kept: of training, in steps that were not made again.
      spent: {kind: seconds}, over all attempts; "train" with what was lost.
      attempts: how often the run was started.
      lost_steps: steps that were made again, as far as the ledger saw them.
    """

    wall: float
    kept: float
    spent: dict[str, float]
    attempts: int
    lost_steps: int

    @property
    def share(self) -> float:
        """The goodput, from 0 to 1."""
        return self.kept / self.wall if self.wall > 0 else 0.0

    def __str__(self) -> str:
        parts = sorted(self.spent.items(), key=lambda part: -part[1])
        spent = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in parts if seconds >= 0.05)
        return (
            f"goodput {self.share:.1%} of {self.wall:.1f} s in {self.attempts} "
            f"attempt{'s' * (self.attempts != 1)}, {self.lost_steps} steps made twice; {spent}"
        )


class Ledger:
    """Counts this attempt's seconds by what they were for.

    Args:
      path: the ledger's file, to which this attempt's lines are added; None keeps none.
      clock: seconds that go on over restarts; one that jumps back makes no time negative.
    """

    def __init__(self, path: pathlib.Path | None, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._before = _lines(path) if path is not None and path.is_file() else []
        self.attempt = max((line["attempt"] for line in self._before), default=0) + 1
        self._began, self._tick = clock(), time.monotonic()
        self._marked = self._tick
        self._spent = dict.fromkeys(KINDS, 0.0)
        self.resumed = 0

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """The block's time is of this kind, one of `KINDS`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(kind, time.monotonic() - began)

    def add(self, kind: str, seconds: float) -> None:
        """Seconds that were measured elsewhere."""
        self._spent[kind] += seconds

    def begin(self, step: int) -> None:
        """Says what step this attempt goes on from: what earlier ones made after it is lost."""
        self.resumed = step
        self.mark(step)

    def tick(self, step: int) -> None:
        """Writes down what was spent, where the last line is some time ago."""
        if time.monotonic() - self._marked >= EVERY:
            self.mark(step)

    def mark(self, step: int) -> None:
        """Writes down what was spent until now, `step` steps being made."""
        self._marked = time.monotonic()
        if self._path is None:
            return
        line = json.dumps(self._line(step)) + "\n"
        # Accounts are no reason to end a run.
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(line)

    def report(self, step: int) -> Goodput:
        """Of all attempts until now."""
        lines = [*self._before, self._line(step)]
        last = {line["attempt"]: line for line in lines}
        kept, lost, spent = 0.0, 0, dict.fromkeys(("train", *KINDS), 0.0)
        floor = step  # what the attempts after this one went on from
        for attempt in sorted(last, reverse=True):
            own = [line for line in lines if line["attempt"] == attempt]
            good = [line for line in own if line["step"] <= floor]
            kept += good[-1]["spent"]["train"] if good else 0.0
            lost += max(0, last[attempt]["step"] - floor)
            floor = min(floor, last[attempt]["resumed"])
            for kind, seconds in last[attempt]["spent"].items():
                spent[kind] += seconds
        began = min(line["began"] for line in lines)
        wall = max(self._clock() - began, sum(spent.values()))
        return Goodput(wall, kept, spent, len(last), lost)

    def _line(self, step: int) -> dict[str, Any]:
        elapsed = time.monotonic() - self._tick
        train = max(0.0, elapsed - sum(self._spent.values()))
        return {
            "attempt": self.attempt,
            "began": self._began,
            "resumed": self.resumed,
            "step": step,
            "spent": {"train": train, **self._spent},
        }


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        return read(path)
    except (OSError, ValueError):
        return []

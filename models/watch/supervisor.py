"""Starts a run again when it breaks: its local processes together, a bounded number of times.

Processes of other machines notice by themselves that one of theirs is gone, end with status 46 and
are started again by the supervisors of their machines; they meet at the coordinator as the first
time.
"""

from __future__ import annotations

import dataclasses
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from models.watch import status
from models.watch.group import Group


@dataclasses.dataclass(frozen=True)
class Supervision:
    """How often, and how soon.

    Raises:
      ValueError: if a number makes no sense.
    """

    restarts: int = 10
    """starts after the first, without a healthy run between them, before giving up"""
    processes: int = 1
    """local processes, connected with one another"""
    backoff: float = 1.0
    """seconds before the first restart; twice as long each time, a minute at most"""
    grace: float = 15.0
    """seconds that the others have to end by themselves after one has failed"""
    healthy: float = 600.0
    """seconds after which a run counts as healthy, and restarts are counted anew"""
    chaos: float | None = None
    """kill a process at random about every so many seconds of a run, to see what happens"""
    kills: int | None = None
    """how many of them; None: as long as the run lasts"""
    seed: int = 0
    """of the chaos"""

    def __post_init__(self) -> None:
        for name, least in (("restarts", 0), ("processes", 1), ("backoff", 0), ("grace", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.chaos is not None and self.chaos <= 0:
            raise ValueError(f"chaos={self.chaos} must be more than 0 seconds")


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def supervise(command: Sequence[str], how: Supervision, say: Callable[[str], None] = _say) -> int:
    """Runs a command until it ends well, or starting again does not help, or was tried enough.

    Args:
      command: the program and its arguments.
      how: often and soon.
      say: where a line for each end goes to.

    Returns:
      The status to end with: 0, or that of the last process that failed, 128 + the signal that
      killed it. A SIGTERM goes on to the processes, and nothing is started again after it.
    """
    chance, told, kills, failures = random.Random(how.seed), threading.Event(), 0, 0
    group: Group | None = None
    due: float | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        told.set()
        if group is not None:
            group.send(number)

    def strike() -> None:
        """Kills one, if it is time to."""
        nonlocal kills, due
        if due is None or group is None or time.monotonic() < due or told.is_set():
            return
        if len(group.running()) < how.processes or (how.kills is not None and kills >= how.kills):
            return
        rank = group.kill_one(chance)
        kills += 1
        say(f"chaos: killed process {rank} of {how.processes} after {group.seconds:.1f} s")
        due = _next(how, chance)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        while True:
            group = Group(command, how.processes)
            due = _next(how, chance)
            if told.is_set():  # while they were started
                group.send(signal.SIGTERM)
            rank, code = group.wait(how.grace, strike)
            lasted = group.seconds
            if code == 0:
                return 0
            failures = 1 if lasted >= how.healthy else failures + 1
            what = (
                f"process {rank} of {how.processes} after {lasted:.1f} s: {status.describe(code)}"
            )
            if told.is_set() or code in status.FINAL:
                say(f"{what}; not started again")
                return _shell(code)
            if failures > how.restarts:
                say(f"{what}; giving up after {how.restarts} restarts")
                return _shell(code)
            pause = min(how.backoff * 2 ** (failures - 1), 60.0)
            say(f"{what}; restart {failures} of {how.restarts} in {pause:g} s")
            if told.wait(pause):
                return _shell(code)
    finally:
        if group is not None:
            group.end()
        signal.signal(signal.SIGTERM, before)


def _next(how: Supervision, chance: random.Random) -> float | None:
    """When the chaos strikes next."""
    if how.chaos is None:
        return None
    return time.monotonic() + how.chaos * chance.uniform(0.5, 1.5)


def _shell(code: int) -> int:
    """A status of `subprocess` as a shell gives it."""
    return 128 - code if code < 0 else code

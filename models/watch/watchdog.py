"""A run that stands still says where: stacks are dumped, and whoever holds up the rest is named.

Every process has a thread that counts in the key-value store of `jax.distributed` and says there
what step the process is at. When no step came for too long, the thread dumps the stacks of its
process, and looks whose count does not move. A process without a count does not run: it is stopped,
dead or cut off. Among those that run, the one with the fewest steps holds up the others. If the
store itself does not answer, it is process 0, where the store lives, that does not run. No clocks
are compared.

Cost: a text of 40 bytes from each process every quarter of the time that makes a stall.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal, TextIO

from models.watch import ending, status, store

FOLDER = "watchdog"
ANSWER = 5.0  # seconds that the store may take


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Watchdog:
    """Watches from the first `beat` on; a context manager.

    Args:
      seconds: without a beat, which make a stall; None watches nothing.
      on_stall: "continue" goes on waiting and says when the run goes on; "abort" ends the process
        with status 43.
      stacks: the folder for `stacks-RANK.txt`; None dumps to stderr.
      others: the store, or None where this process is alone.
      rank: the number of this process.
      say: where lines go to.
      end: what ends the process.
    """

    def __init__(
        self,
        seconds: float | None,
        on_stall: Literal["continue", "abort"] = "continue",
        *,
        stacks: pathlib.Path | None = None,
        others: store.Store | None = None,
        rank: int = 0,
        say: Callable[[str], None] = _say,
        end: Callable[[int], None] = ending.leave,
    ) -> None:
        self.seconds = seconds
        self.answer = min(ANSWER, seconds or ANSWER)
        self.on_stall = on_stall
        self.stacks = stacks
        self.others = others
        self.rank = rank
        self.say = say
        self.end = end
        self.step: int | None = None
        self.beaten = 0.0
        self.count = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.seconds is not None:
            self._publish()  # at once: who is stopped before the first turn is to be named too
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self.answer)

    def beat(self, step: int) -> None:
        """Says that the run is alive, and at which step. Costs nothing."""
        self.step, self.beaten = step, time.monotonic()

    def rest(self) -> None:
        """Watches nothing until the next beat: before what may take long, as compiling does."""
        self.step = None

    def _watch(self) -> None:
        assert self.seconds is not None
        told = False
        while not self._over.wait(self.seconds / 4):
            self._publish()
            step, silent = self.step, time.monotonic() - self.beaten
            if step is None or silent < self.seconds:
                if told and step is not None:
                    self.say(f"the run goes on: {store.myself()} is at step {step}")
                told = False
            elif not told:
                told = True
                self._report(step, silent)

    def _publish(self) -> None:
        if self.others is None:
            return
        self.count += 1
        state = {
            "count": self.count,
            "step": self.step,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        text, others = json.dumps(state), self.others
        with contextlib.suppress(Exception):  # a report, not this, says that the store is gone
            store.within(self.answer, lambda: others.put(f"{FOLDER}/{self.rank}", text))

    def _report(self, step: int, silent: float) -> None:
        where = self._dump()
        self.say(
            f"no step for {silent:.0f} s: {store.myself()} is at step {step}; all its stacks are "
            f"in {where}"
        )
        if self.others is not None:
            self.say(self._suspects(step))
        if self.on_stall == "abort":
            self.say(f"ending {store.myself()}, status {status.STALLED}")
            self.end(status.STALLED)

    def _dump(self) -> str:
        if self.stacks is None:
            _dump_to(sys.stderr)
            return "stderr"
        self.stacks.mkdir(parents=True, exist_ok=True)
        path = self.stacks / f"stacks-{self.rank}.txt"
        with path.open("a", encoding="utf-8") as file:
            _dump_to(file)
        return str(path)

    def _suspects(self, step: int) -> str:
        """Who holds up the run, in a line: looks twice, and sees who counts meanwhile."""
        assert self.others is not None and self.seconds is not None
        try:
            before = self._states()
            # Time for everyone to count twice.
            for _ in range(2):
                self._over.wait(self.seconds / 4)
                self._publish()
            after = self._states()
        except Exception:
            return (
                "process 0 does not answer: it is stopped, dead or cut off, and the key-value "
                "store with it"
            )
        still = [
            rank
            for rank in sorted(after, key=int)
            if int(rank) != self.rank and after[rank]["count"] == before.get(rank, {}).get("count")
        ]
        if still:
            return "stopped, dead or cut off: " + ", ".join(_name(r, after[r]) for r in still)
        steps = {
            rank: int(state["step"]) for rank, state in after.items() if state["step"] is not None
        }
        if steps and min(steps.values()) < max(steps.values()):
            last = [rank for rank in sorted(steps, key=int) if steps[rank] == min(steps.values())]
            return "behind the others: " + ", ".join(_name(r, after[r]) for r in last)
        return f"all {len(after)} processes run, and hang at step {step}"

    def _states(self) -> dict[str, dict[str, int | str | None]]:
        assert self.others is not None
        found = self.others.folder(FOLDER, self.answer)
        return {rank: json.loads(text) for rank, text in found.items()}


def _name(rank: str, state: dict[str, int | str | None]) -> str:
    return f"process {rank} (pid {state['pid']} on {state['host']}) at step {state['step']}"


def _dump_to(file: TextIO) -> None:
    file.write(f"\nstacks of {store.myself()}\n")
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)

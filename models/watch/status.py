"""The statuses that a training process ends with, so that whoever started it knows what to do next.

| status | meaning | starting it again |
|---|---|---|
| 0 | finished, or left after a SIGTERM with everything saved | goes on where it stopped |
| 2 | the command line is wrong | does not help |
| 42 | gave up: too many bad steps, rolled back too often | does not help |
| 43 | no step for too long, ended by the watchdog | helps |
| 44 | the processes do not agree on config, code or program | does not help |
| 45 | copies of a parameter differ, or a checksum failed | helps: the last checkpoint is good |
| 46 | another process is gone | helps |
| 75 | as the 0 after a SIGTERM, where `--watch.preempted-status 75` asks for it | goes on |
"""

from __future__ import annotations

FINISHED = 0
USAGE = 2
GAVE_UP = 42
STALLED = 43
DISAGREES = 44
CORRUPTED = 45
PEER_LOST = 46
PREEMPTED = 75

MEANINGS = {
    FINISHED: "finished",
    USAGE: "the command line is wrong",
    GAVE_UP: "gave up after too many bad steps",
    STALLED: "no step for too long, ended by the watchdog",
    DISAGREES: "the processes do not agree on config, code or program",
    CORRUPTED: "copies of a parameter differ, or a checksum failed",
    PEER_LOST: "another process is gone",
    PREEMPTED: "left after a SIGTERM with everything saved",
}

FINAL = (FINISHED, USAGE, GAVE_UP, DISAGREES)
"""What starting again does not change."""


class Fault(Exception):
    """An error with the status to end with.

    Args:
      message: what happened, in a line.
      status: one of this file.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def describe(status: int) -> str:
    """A status as `subprocess` gives it, in words: "status 43: no step for ..., "killed by 9"."""
    if status < 0:
        import signal

        names = {one.value: one.name for one in signal.Signals}
        return f"killed by {names.get(-status, -status)}"
    return f"status {status}" + (f": {MEANINGS[status]}" if status in MEANINGS else "")

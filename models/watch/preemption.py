"""SIGTERM: all processes leave after the same step, with everything saved.

Whoever takes machines away announces it by SIGTERM, to one process or to all, some time before
SIGKILL. Where `jax.distributed` connects the processes, its preemption service spreads the notice
and agrees on a step that none of them has passed; else this process alone leaves after the step
that it is at. A second SIGTERM, or one in the middle of a save, changes nothing: a notice is a flag
that the loop reads between steps.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from jax.experimental import multihost_utils

from models.watch import store


class Preemption:
    """Whether it is time to leave; a context manager, which puts the old handler of SIGTERM back.

    Outside of the main thread of a process that is alone, nothing is listened to: Python allows
    signal handlers in the main thread only.
    """

    def __init__(self) -> None:
        self._alone = store.connected() is None
        self._listens = self._alone and threading.current_thread() is threading.main_thread()
        self._noticed = False
        self._before: Any = None
        self._asked = 0

    def __enter__(self) -> Preemption:
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._noticed = True

    def reached(self) -> bool:
        """Whether all processes leave now; each of them asks once after every step.

        The count of the questions is what the processes agree on, so a step that is taken again
        after a rollback does not confuse them. The answer is the same in every process, turns to
        yes about a second after the notice, and stays so.
        """
        self._asked += 1
        if not self._alone and multihost_utils.reached_preemption_sync_point(self._asked):
            self._noticed = True
        return self._noticed

"""The processes of a run on this machine: started together, numbered, and ended together."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence


class Group:
    """Several processes of one command, numbered for `distributed.connect`.

    Args:
      command: the program and its arguments.
      processes: how many; one alone gets no variables, so that a cluster's stay what they are.
    """

    def __init__(self, command: Sequence[str], processes: int) -> None:
        self.began = time.monotonic()
        # Each start has a port of its own: nobody meets a process of the last one.
        port = free_port()
        self.members = [
            subprocess.Popen(command, env=os.environ | _variables(rank, processes, port))
            for rank in range(processes)
        ]

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    def running(self) -> list[int]:
        """The ranks that have not ended."""
        return [rank for rank, one in enumerate(self.members) if one.poll() is None]

    def send(self, number: int) -> None:
        """A signal to all that run."""
        for rank in self.running():
            self.members[rank].send_signal(number)

    def kill_one(self, chance: random.Random) -> int | None:
        """SIGKILL to one at random. Returns its rank."""
        running = self.running()
        if not running:
            return None
        rank = chance.choice(running)
        self.members[rank].kill()
        return rank

    def wait(self, grace: float, each: Callable[[], None], pause: float = 0.1) -> tuple[int, int]:
        """Waits until all have ended, or one has with a status that is not 0 and `grace` is over.

        Args:
          grace: seconds that the others have to end by themselves, with their own last words.
          each: called between looks.
          pause: seconds between looks.

        Returns:
          Rank and status of the first that failed, or (0, 0).
        """
        failed: tuple[int, int] | None = None
        end = 0.0
        while running := self.running():
            if failed is None and (failed := self._failed()) is not None:
                end = time.monotonic() + grace
            if failed is not None and time.monotonic() > end:
                for rank in running:
                    self.members[rank].kill()
            each()
            time.sleep(pause)
        return failed or self._failed() or (0, 0)

    def end(self) -> None:
        """Kills what still runs, and waits for it."""
        self.send(signal.SIGKILL)
        for one in self.members:
            one.wait()

    def _failed(self) -> tuple[int, int] | None:
        """A process that failed: one that was killed before one that noticed."""
        ended = [(rank, code) for rank, one in enumerate(self.members) if (code := one.returncode)]
        return min(ended, key=lambda one: one[1], default=None)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port: int = listener.getsockname()[1]
    return port


def _variables(rank: int, processes: int, port: int) -> dict[str, str]:
    if processes == 1:
        return {}
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(rank),
    }

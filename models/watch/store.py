"""The key-value store of `jax.distributed`: what the processes tell one another outside of steps.

It lives in process 0, and answers while the devices are busy or hang. This is the one file that
knows where jax keeps it.
"""

from __future__ import annotations

import concurrent.futures
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from jax._src import distributed

T = TypeVar("T")


class Store(Protocol):
    """Texts by name, seen by all processes."""

    def put(self, key: str, value: str) -> None:
        """Sets a text, whatever it was."""

    def get(self, key: str, seconds: float) -> str:
        """Waits until there is such a text. Raises TimeoutError."""

    def folder(self, prefix: str, seconds: float) -> dict[str, str]:
        """All texts under a prefix, by the rest of their names. Raises TimeoutError."""


class Coordinator:
    """The store of the connected processes.

    Args:
      client: of `jax.distributed`.
    """

    def __init__(self, client: Any) -> None:
        self.client = client

    def put(self, key: str, value: str) -> None:
        """Sets a text; see `Store`."""
        self.client.key_value_set(key, value, allow_overwrite=True)

    def get(self, key: str, seconds: float) -> str:
        """Waits for a text; see `Store`."""
        try:
            value: str = self.client.blocking_key_value_get(key, int(1000 * seconds))
        except Exception as error:  # jaxlib's own type, which moved between versions
            raise TimeoutError(f"no {key} within {seconds:g} s") from error
        return value

    def folder(self, prefix: str, seconds: float) -> dict[str, str]:
        """All texts under a prefix; see `Store`."""
        found = within(seconds, lambda: self.client.key_value_dir_get(prefix))
        return {key.removeprefix(prefix).lstrip("/"): value for key, value in found}


def within(seconds: float, call: Callable[[], T]) -> T:
    """What a call gives, in a thread of its own, which is left behind if it hangs.

    Raises:
      TimeoutError: if the call takes longer.
    """
    promise: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        try:
            promise.set_result(call())
        except Exception as error:
            promise.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return promise.result(timeout=seconds)


def connected() -> Coordinator | None:
    """The store, or None where this process is the only one."""
    client = distributed.global_state.client
    return Coordinator(client) if client is not None else None


def rank() -> int:
    """The number of this process, without asking for devices."""
    return int(distributed.global_state.process_id)


def coordinator() -> str:
    """HOST:PORT of process 0, or an empty text."""
    return distributed.global_state.coordinator_address or ""


def processes() -> int:
    """How many there are, without asking for devices."""
    return int(distributed.global_state.num_processes)


def myself() -> str:
    """This process, for a message: `process 1 (pid 77 on node3)`."""
    return f"process {rank()} (pid {os.getpid()} on {socket.gethostname()})"

"""Notices within a second that a process of the run is gone, whatever the collectives do.

A collective that misses a process may fail at once, or hang: on GPUs it mostly hangs. And the
heartbeats of `jax.distributed` take minutes. But the kernel closes the connections of a process
that dies. So all processes keep one open to the first: it sees the others go and tells the rest,
and they see it go. Nothing else is said on them, but for a word before leaving.

A machine that loses its power or its network closes nothing, and a stopped process does not either:
those are for the heartbeats and the watchdog.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable
from types import TracebackType

from models.watch import store

PORT = "peers/port"
BYE, LOST = b"bye\n", b"lost "
SOON = 1.0  # seconds
LINE = 32  # bytes of the longest message


class Peers:
    """Keeps the connections; a context manager, whose end says goodbye if there was no error.

    Args:
      others: the key-value store, where the first process says its port.
      rank, processes: which one this is, and how many there are.
      host: where the first one is.
      lost: called once, in a thread, with the rank that is gone.
      patience: seconds to wait for the first one.

    Raises:
      OSError: if the first one cannot be reached.
    """

    def __init__(
        self,
        others: store.Store,
        rank: int,
        processes: int,
        host: str,
        lost: Callable[[int], None],
        patience: float = 15.0,
    ) -> None:
        self.rank, self.processes, self.lost = rank, processes, lost
        self._quiet = threading.Event()  # who goes now is none of our business
        self._over = threading.Event()
        self._lines: dict[int, socket.socket] = {}
        if rank == 0:
            listener = socket.create_server(("", 0), backlog=processes)
            others.put(PORT, str(listener.getsockname()[1]))
            work: Callable[[socket.socket], None] = self._listen
            first = listener
        else:
            first = socket.create_connection((host, int(others.get(PORT, patience))), patience)
            first.settimeout(None)
            first.sendall(f"{rank}\n".encode())
            self._lines[0] = first
            work = self._wait
        self._thread = threading.Thread(target=work, args=(first,), name="peers", daemon=True)

    def __enter__(self) -> Peers:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._thread.join(timeout=SOON)  # it may know whom a collective missed
        self._quiet.set()
        if error is None:
            for line in list(self._lines.values()):
                with contextlib.suppress(OSError):
                    line.sendall(BYE)
        self._over.set()  # not before: lines are closed after it

    def _gone(self, rank: int) -> None:
        if not self._quiet.is_set():
            self._quiet.set()
            self.lost(rank)

    def _wait(self, line: socket.socket) -> None:
        """Of all but the first: waits for its word, or its end."""
        said = b""
        with contextlib.suppress(OSError), line:
            while not said.endswith(b"\n") and (more := line.recv(LINE)):
                said += more
        if said.startswith(LOST):
            self._gone(int(said.removeprefix(LOST)))
        elif said != BYE:
            self._gone(0)

    def _listen(self, listener: socket.socket) -> None:
        """Of the first: who comes, and who goes."""
        with selectors.DefaultSelector() as selector, listener:
            selector.register(listener, selectors.EVENT_READ, None)
            while not self._over.is_set():
                for key, _ in selector.select(timeout=1.0):
                    if key.fileobj is listener:
                        line, _ = listener.accept()
                        selector.register(line, selectors.EVENT_READ, line)
                    elif not self._hears(key.data):
                        selector.unregister(key.fileobj)
                        key.data.close()
            for line in self._lines.values():
                line.close()

    def _hears(self, line: socket.socket) -> bool:
        """Takes what a process says: first its rank. Returns whether it stays."""
        said = b""
        with contextlib.suppress(OSError):
            said = line.recv(LINE)
        rank = next((rank for rank, known in self._lines.items() if known is line), None)
        if rank is None:
            # A stranger that found the port says no rank, and is not listened to.
            number = said.strip()
            if not (number.isdigit() and 0 < int(number) < self.processes):
                return False
            self._lines[int(number)] = line
            return True
        del self._lines[rank]
        if said != BYE and not self._quiet.is_set():
            for other in self._lines.values():
                with contextlib.suppress(OSError):
                    other.sendall(LOST + f"{rank}\n".encode())
            self._gone(rank)
        return False

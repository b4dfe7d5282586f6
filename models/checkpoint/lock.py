"""One job at a time in a run's folder: a lock that dies with its process.

The kernel's lock on the file (`flock`) is what decides; it ends with the process, however that
ends. The text in the file says whose it is. File systems that do not carry such locks from host to
host (Lustre without `-o flock`, some FUSE mounts) would let two hosts in: the holder therefore
counts in the file, and a text of another host is watched until the count moves or patience ends.

What it cannot do: where locks are not carried *and* both hosts start within the same moment, or
the holder is stopped for longer than the patience, both get in.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time
from types import TracebackType
from typing import Any

NAME = "lock"
BEAT = 2.0  # seconds between two counts of the holder
PATIENCE = 4 * BEAT  # how long the text of another host is watched
_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

log = logging.getLogger(__name__)


class Held(RuntimeError):
    """Another job has the folder."""


class Lock:
    """Holds a folder until it is closed, or its process ends.

    Args:
      folder: an existing folder that can be written to.
      beat, patience: seconds, as above.

    Raises:
      Held: if another job has it, with its process, host and start.
      OSError: if the folder cannot be written to.
    """

    def __init__(
        self, folder: pathlib.Path, *, beat: float = BEAT, patience: float = PATIENCE
    ) -> None:
        self.path = folder / NAME
        self._beat = beat
        self._owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "born": _born(os.getpid()),
        }
        self._file = self._taken(patience)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._count, name="checkpoint lock", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives the folder back."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        if _same(self._file, self.path):
            with contextlib.suppress(OSError):  # a disk that became read-only
                self.path.unlink()
        os.close(self._file)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _taken(self, patience: float) -> int:
        """The locked file, open."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                supported = self._locked(file)
                if not _same(file, self.path):  # the last holder removed it in this moment
                    os.close(file)
                    continue
                self._watch(_read(self.path), supported, patience)
            except BaseException:
                os.close(file)
                raise
            self._write(file, 0)
            return file

    def _locked(self, file: int) -> bool:
        """Whether the file system has locks at all; Held if another process has this one."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            if not isinstance(error, BlockingIOError):
                raise
            owner = _read(self.path)
            if owner.get("host") != self._owner["host"] or _alive(owner):
                raise Held(self._message(owner)) from None
            # Its owner is dead, and a process that it forked still has the file open. A new file
            # has a new lock; unless another job has made it in the meantime.
            if _same(file, self.path):
                self.path.unlink(missing_ok=True)
        return True

    def _watch(self, owner: dict[str, Any], supported: bool, patience: float) -> None:
        """Raises Held if the owner lives, as far as that can be told."""
        if not owner:
            return
        if owner.get("host") == self._owner["host"]:
            if not supported and _alive(owner):
                raise Held(self._message(owner))
        else:
            end = time.monotonic() + patience
            while time.monotonic() < end:
                time.sleep(min(self._beat, patience) / 2)
                if _read(self.path).get("count", 0) != owner.get("count", 0):
                    raise Held(self._message(owner))
        log.warning("%s was left by %s, which is gone: taken over", self.path, _who(owner))

    def _message(self, owner: dict[str, Any]) -> str:
        return (
            f"{self.path.parent} is in use by {_who(owner)}. Two jobs in one folder would "
            "overwrite each other's checkpoints: wait for it, end it, or choose another folder"
        )

    def _count(self) -> None:
        number = 0
        while not self._ended.wait(self._beat):
            number += 1
            self._write(self._file, number)

    def _write(self, file: int, count: int) -> None:
        """The owner and the count. A full disk has no room for them, and the lock still holds."""
        text = json.dumps({**self._owner, "count": count}).ljust(256) + "\n"
        with contextlib.suppress(OSError):
            os.pwrite(file, text.encode(), 0)


def _same(file: int, path: pathlib.Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _who(owner: dict[str, Any]) -> str:
    if not owner:
        return "a job that left no name"
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}"


def _alive(owner: dict[str, Any]) -> bool:
    """Whether a process of this host still runs, and is not another one of the same number."""
    pid = owner.get("pid")
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    born = owner.get("born")
    return born is None or _born(pid) in (None, born)


def _born(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None where the kernel does not tell."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]

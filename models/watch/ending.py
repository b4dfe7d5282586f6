"""Ending a process as its errors say, without waiting for others that are gone."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

from models.watch import status, store

# What errors say in which a process misses another: gloo, jax's coordination service, and NCCL.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "heartbeat timeout",
    "coordination service",
    "CoordinationService",
    "Gloo",
    "NCCL",
    "Timed out waiting",
)


def cause(error: BaseException) -> status.Fault | None:
    """What an error means for the run, in a line; None where it is what it says.

    Args:
      error: what the loop raised.
    """
    if isinstance(error, status.Fault):
        return error
    text = str(error)
    if store.connected() is not None and any(sign in text for sign in LOST):
        line = next((line for line in text.splitlines() if any(s in line for s in LOST)), text)
        return status.Fault(
            f"{store.myself()} lost another process: {line[:300]}", status.PEER_LOST
        )
    return None


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Ends the process as its errors say, with a line and a status of `status.py`.

    Where processes are connected, at once: the ordinary way out waits for all of them, minutes
    long, and those that are gone do not come.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        code = 130 if isinstance(end, KeyboardInterrupt) else end.code
        if store.connected() is None or code in (None, 0):
            raise
        if isinstance(code, str):
            print(code, file=sys.stderr)
        leave(code if isinstance(code, int) else 1)
    except Exception as error:
        fault = cause(error)
        if store.connected() is None:
            if fault is None:
                raise
            print(f"{fault}", file=sys.stderr)
            raise SystemExit(fault.status) from error
        if fault is None or fault is not error:
            traceback.print_exception(error)
        if fault is not None:
            print(f"{fault}", file=sys.stderr)
        leave(fault.status if fault else 1)


def leave(code: int) -> None:
    """Ends this process now, without a word to the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""One run at a time in a folder, whether or not it saves checkpoints there."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

import jax

from models.checkpoint import agree
from models.checkpoint.lock import Held, Lock


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
    """Holds a folder for the processes of this run, as long as the block lasts.

    Args:
      folder: is made if it is not there; the first process holds it.

    Raises:
      Held: in all processes, if another run has it.
      OSError: in all processes, if it cannot be written to.
    """
    lock, held, error = None, "", ""
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(folder)
        except Held as found:
            held = str(found)
        except OSError as found:
            error = str(found)
    held, error = agree.first([held, error])
    if held:
        raise Held(held)
    if error:
        raise OSError(f"{folder} cannot be written to ({error}); choose another with --out")
    try:
        yield
    finally:
        if lock is not None:
            lock.close()

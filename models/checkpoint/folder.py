"""A run's folder of checkpoints: one job saves to it, and finds in it the newest that is good."""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import jax

from models.checkpoint import agree, retention, walking
from models.checkpoint.config import Checkpoints
from models.checkpoint.lock import Held, Lock
from models.checkpoint.saving import Saving, plain
from models.checkpoint.walking import Restored

log = logging.getLogger(__name__)


class Folder:
    """The checkpoints of a run. All processes make one, and call its methods in the same order.

    Args:
      path: the folder; on a file system that all processes share.
      config: when to save, and what to keep.
      identity: what must be the same in a run that continues this one, as nested dictionaries of
        what JSON can say: the model, the optimiser; not the mesh.
      writable: False to restore only, from a folder that another job may be using: nothing is
        locked, swept, set aside or saved.
      say: is told what people should read, in the first process.

    Raises:
      Held: if another job has the folder.
      OSError: if the folder cannot be written to.
    """

    def __init__(
        self,
        path: pathlib.Path,
        config: Checkpoints,
        *,
        identity: dict[str, Any],
        writable: bool = True,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        self.path, self.config = path.absolute(), config
        self.identity = json.loads(json.dumps(identity))
        self.last_error: str | None = None
        """why the last save failed; None if it did not"""
        self._say = say if jax.process_index() == 0 else log.debug
        self._writable = writable
        self._lock: Lock | None = None
        self._saving: Saving | None = None
        self._attempt = 0
        self._saved: set[int] = set()
        if writable:
            self._open()

    def _open(self) -> None:
        """Takes the lock and sweeps, in the first process; all raise what it meets."""
        outcome: dict[str, Any] = {}
        if jax.process_index() == 0:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = Lock(self.path)
                outcome = {"swept": retention.sweep(self.path)}
            except Held as error:
                outcome = {"held": str(error)}
            except OSError as error:
                outcome = {"error": plain(error)}
        outcome = agree.first(outcome)
        if "error" in outcome:
            self.close()
        if "held" in outcome:
            raise Held(outcome["held"])
        if "error" in outcome:
            raise OSError(
                f"{self.path} cannot be written to ({outcome['error']}): no checkpoint could be "
                "saved. Choose another folder"
            )
        if outcome["swept"]:
            self._say(f"{self.path}: removed {', '.join(outcome['swept'])}, left by a killed job")

    def steps(self) -> list[int]:
        """The steps of the checkpoints, oldest first. Whether one is good, restoring it tells."""
        return retention.steps(self.path)

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be saved now; the same in all processes.

        It is at each multiple of `every`, and some steps after a save that failed.

        Args:
          step: how many updates were made.
        """
        if self.config.every is None:
            return False
        if step % self.config.every == 0:
            return True
        if not self._attempt or (step - self._attempt) % self.config.patience:
            return False
        if self._saving is not None:
            if any(agree.exchange(self._saving.running)):
                return False
            self._settle()
        return self.last_error is not None

    def save(self, step: int, state: Any, extra: dict[str, Any], *, wait: bool = False) -> None:
        """Begins to save; returns when the arrays may be given away. Waits for the save before it.

        A save that fails is told to `say` and kept in `last_error`: the run goes on, the older
        checkpoints stay, and `due` asks for another.

        Args:
          step: how many updates were made. One that this folder has saved already is left alone.
          state: a tree of arrays.
          extra: what JSON can say; the first process's is kept.
          wait: until the checkpoint is there.

        Raises:
          TypeError: if `extra` holds what JSON cannot say.
        """
        if not self._writable:
            raise ValueError(f"{self.path} was opened to restore only: writable=False")
        extra = json.loads(json.dumps(extra))
        self._settle()
        if step in self._saved:
            return
        self._attempt = step
        try:
            with jax.transfer_guard("allow"):
                self._saving = Saving(
                    self.path,
                    step,
                    state,
                    extra=extra,
                    identity=self.identity,
                    keep=self.config.keep,
                    keep_every=self.config.keep_every,
                    timeout=self.config.timeout,
                )
        except OSError as error:
            self._failed(step, str(error))
        if wait:
            self._settle()

    def wait(self) -> None:
        """Waits until nothing is being saved."""
        self._settle()

    def _settle(self) -> None:
        """Ends the save that goes on; all processes learn from the first how it went."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        saving.wait()
        error = agree.first(saving.error)
        if error is None:
            self.last_error = None
            self._saved.add(saving.step)
        else:
            self._failed(saving.step, error)

    def _failed(self, step: int, error: str) -> None:
        self.last_error = f"the checkpoint of step {step} was not saved: {error}"
        there = self.steps()
        newest = f"the newest is of step {there[-1]}" if there else "there is no older one"
        again = f"tried again {self.config.patience} steps later" if self.config.every else ""
        self._say(f"WARNING: {self.last_error}; {newest}. Training goes on. {again}".rstrip())

    def discard_after(self, step: int) -> list[int]:
        """Deletes the checkpoints after a step, which a run that goes back to it will not continue.

        Returns:
          Their steps.
        """
        self._settle()
        later = [number for number in self.steps() if number > step]
        if jax.process_index() == 0:
            for number in later:
                retention.remove(retention.path_of(self.path, number))
        self._saved -= set(later)
        return agree.first(later)

    def restore(
        self,
        like: Any,
        *,
        step: int | None = None,
        before: int | None = None,
        optional: Mapping[str, Any] | None = None,
    ) -> Restored | None:
        """The newest checkpoint that is good.

        Its values are verified against the sums of when they were saved. One that is damaged is
        told to `say`, set aside as NUMBER.damaged, and the next older one is tried.

        Args:
          like: a tree of `jax.ShapeDtypeStruct` with shardings: what to restore, and where to. The
            mesh need not be the one of the save.
          step: which one; None: the newest. A damaged one that was named is an error.
          before: only checkpoints of this step or an earlier one are looked at.
          optional: fields of the state that the checkpoint may lack, or have in vain. {field: what
            fills it}: the name of another field of the same structure, whose values are copied, or
            a tree of arrays.

        Returns:
          What was restored; None if there are no checkpoints.

        Raises:
          Damaged: if all are damaged, or the newest is and the config says `strict`.
          Mismatch: if the newest one is of another model, optimiser, dtype or schema.
        """
        self._settle()
        there = [n for n in self.steps() if before is None or n <= before]
        asked: list[int] = agree.first(there if step is None else [step])
        if not asked:
            return None
        strict = self.config.strict or step is not None
        with jax.transfer_guard("allow"):
            found = walking.newest_good(
                self.path, asked, like, self.identity, optional or {}, strict=strict, say=self._say
            )
        if self._writable and step is None:
            walking.set_aside(self.path, found, say=self._say)
        return found

    def close(self) -> None:
        """Waits for a save that goes on, and gives the folder back."""
        if self._saving is not None:  # without a collective: other processes may be gone
            saving, self._saving = self._saving, None
            if error := saving.wait():
                self._failed(saving.step, error)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

"""One save: the arrays leave the devices at once, everything else happens in the background.

Every process writes its shards and a list of its files. When all have, the first process joins the
shards into one database, writes the manifest, and renames the folder: from that moment on it is a
checkpoint. A process that fails still comes to the barriers, so the others never wait for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import threading
import time
from typing import Any

import jax

from models.checkpoint import agree, arrays, files, manifest, retention, sums
from models.checkpoint.files import File

_PART = "process-{}.json"

log = logging.getLogger(__name__)


class Saving:
    """A save that has begun. All processes make one, with the same arguments.

    Args:
      folder: of all checkpoints.
      step: which one this is.
      state: a tree of arrays. They may be given away when this returns.
      extra, identity: see `manifest.Manifest`.
      keep, keep_every: which older checkpoints stay when this one is there.
      timeout: seconds that it may take.

    Raises:
      OSError: if the first process cannot make a folder, in all processes.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        step: int,
        state: Any,
        *,
        extra: dict[str, Any],
        identity: dict[str, Any],
        keep: int,
        keep_every: int | None,
        timeout: float,
    ) -> None:
        self.step = step
        self.error: str | None = None
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._timeout = timeout
        named = arrays.named(state)
        size = sum(x.size * x.dtype.itemsize for x in named.values())
        self._draft = _drafted(folder, step, size)
        self._arrays = {
            name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in named.items()
        }
        self._extra, self._identity = extra, identity
        writing = None
        try:
            self._sums = sums.sums(named)
            writing = arrays.start(self._draft, named)
        except Exception as error:  # whatever it is, training goes on
            self.error = plain(error)
        self._writing = writing or []
        self._thread = threading.Thread(target=self._run, name=f"checkpoint of step {step}")
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it still goes on in this process."""
        return self._thread.is_alive()

    def wait(self) -> str | None:
        """Waits for its end: what went wrong in this process, or None."""
        self._thread.join()
        return self.error

    def _run(self) -> None:
        leader = jax.process_index() == 0
        try:
            if self.error is None:
                self._write_part()
        except Exception as error:
            self.error = plain(error)
        try:
            agree.barrier(f"checkpoint/{self._draft.name}/written", self._timeout)
            if leader and self.error is None:
                self._commit()
        except Exception as error:
            self.error = plain(error)
        if leader and self.error is not None:
            _removed(self._draft)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first process has decided
            agree.barrier(f"checkpoint/{self._draft.name}/ended", self._timeout)

    def _write_part(self) -> None:
        for future in self._writing:
            future.result(timeout=self._timeout)
        self._writing = []
        number = jax.process_index()
        names = files.below(self._draft, f"ocdbt.process_{number}")
        written = files.described(self._draft, names)
        part = {name: [file.size, file.digest] for name, file in written.items()}
        (self._draft / _PART.format(number)).write_text(json.dumps(part), encoding="utf-8")

    def _commit(self) -> None:
        written: dict[str, File] = {}
        for number in range(jax.process_count()):
            part = self._draft / _PART.format(number)
            if not part.exists():
                raise OSError(f"process {number} could not write its part; its log says why")
            listed = json.loads(part.read_text(encoding="utf-8"))
            written |= {name: File(size, digest) for name, (size, digest) in listed.items()}
            part.unlink()
        arrays.finish(self._draft)
        others = [name for name in files.below(self._draft) if name not in written]
        written |= files.described(self._draft, others)
        holds = files.holdings(self._draft)
        held = {name: File(f.size, f.digest, holds.get(name, ())) for name, f in written.items()}
        of_values = sums.texts(self._arrays, self._sums)
        described = {name: {**x, "sum": of_values[name]} for name, x in self._arrays.items()}
        about = manifest.Manifest(self.step, described, self._extra, self._identity, held)
        about.write(self._draft)
        for path in (*self._draft.rglob("*"), self._draft):
            if path.is_dir():
                retention.sync(path)
        retention.commit(self._draft, retention.path_of(self._folder, self.step))
        try:
            retention.prune(self._folder, self._keep, self._keep_every)
        except OSError as error:  # the new one is there all the same
            log.warning("older checkpoints in %s stay: %s", self._folder, error)


def plain(error: BaseException) -> str:
    """An error in one line of bounded length."""
    text = str(error)
    if found := re.search(r"os_error_code='(\d+)'", text):  # TensorStore, after what it was doing
        return os.strerror(int(found[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = text.strip().partition("\n")[0]
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__


def _drafted(folder: pathlib.Path, step: int, size: int) -> pathlib.Path:
    """A new folder to write `size` bytes to, made by the first process. No name is used twice."""
    made: dict[str, str] = {}
    if jax.process_index() == 0:
        name = f"{step:08d}.{secrets.token_hex(4)}.{retention.SAVING}"
        try:
            retention.sweep(folder)  # what a save that failed could not remove
            free = shutil.disk_usage(folder).free
            if free < size:
                raise OSError(f"{size / 1e6:,.0f} MB do not fit: the disk has {free / 1e6:,.0f} MB")
            (folder / name).mkdir()
            made = {"name": name}
        except OSError as error:
            made = {"error": plain(error)}
    made = agree.first(made)
    if "error" in made:
        raise OSError(made["error"])
    return folder / made["name"]


def _removed(draft: pathlib.Path) -> None:
    """Deletes a draft to which writes may still come that nobody waits for, after one failed."""
    for _ in range(50):
        shutil.rmtree(draft, ignore_errors=True)
        time.sleep(0.02)
        if not draft.exists():
            return

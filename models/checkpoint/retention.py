"""The folders of checkpoints: their names, which of them are old, and how one disappears.

    00000040                    a checkpoint, whole
    00000060.1f3a99c0.saving    one that is being written, or what a killed save left
    00000020.removed            one that is being deleted
    00000050.damaged            one that could not be restored, kept aside

A rename is what makes a checkpoint, and what ends one: nothing half written or half deleted ever
has a checkpoint's name.
"""

from __future__ import annotations

import errno
import os
import pathlib
import re
import shutil
from collections.abc import Sequence

from models.checkpoint import manifest

SAVING, REMOVED, DAMAGED = "saving", "removed", "damaged"
_WHOLE = re.compile(r"\d{8,}")
_DEBRIS = re.compile(rf"\d{{8,}}(\.\w+)?\.({SAVING}|{REMOVED})")
_ASIDE = re.compile(rf"(\d{{8,}})\.{DAMAGED}")


def path_of(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Where the checkpoint of a step is."""
    return folder / f"{step:08d}"


def steps(folder: pathlib.Path) -> list[int]:
    """The steps of the checkpoints, oldest first."""
    names = (path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ()
    return sorted(int(name) for name in names if _WHOLE.fullmatch(name))


def old(steps: Sequence[int], keep: int, keep_every: int | None) -> list[int]:
    """Which steps are no longer kept: neither among the newest nor multiples of `keep_every`."""
    spared = set(sorted(steps)[-keep:])
    return [
        n for n in sorted(steps) if n not in spared and not (keep_every and n % keep_every == 0)
    ]


def prune(folder: pathlib.Path, keep: int, keep_every: int | None) -> list[int]:
    """Deletes the old checkpoints, and damaged ones that are older than all newest.

    Returns:
      The steps that were deleted.
    """
    there = steps(folder)
    gone = old(there, keep, keep_every)
    for step in gone:
        remove(path_of(folder, step))
    oldest = there[-keep] if len(there) >= keep else 0
    for path in folder.iterdir():
        if (match := _ASIDE.fullmatch(path.name)) and int(match[1]) < oldest:
            remove(path)
    return gone


def remove(path: pathlib.Path) -> None:
    """Deletes a checkpoint, which is none any more from the first moment on."""
    doomed = path.with_name(f"{path.name.partition('.')[0]}.{REMOVED}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def commit(draft: pathlib.Path, path: pathlib.Path) -> None:
    """Makes a draft the checkpoint, in place of an older one of the same step.

    Whoever is killed between the two renames leaves a draft that is complete: see `sweep`.
    """
    doomed = path.with_name(f"{path.name}.{REMOVED}")
    if path.exists():
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    draft.rename(path)
    sync(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def set_aside(path: pathlib.Path) -> None:
    """Renames a damaged checkpoint, so that it is tried no more and its step can be saved anew."""
    aside = path.with_name(f"{path.name}.{DAMAGED}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def sweep(folder: pathlib.Path) -> list[str]:
    """Deletes what killed saves and deletions left. Only the holder of the lock may.

    A draft that lacks nothing but its name becomes a checkpoint, unless there is one of its step.

    Returns:
      The names of what was deleted.
    """
    gone = []
    for path in sorted(path for path in folder.iterdir() if _DEBRIS.fullmatch(path.name)):
        whole = path.with_name(path.name.partition(".")[0])
        if path.suffix == f".{SAVING}" and not whole.exists() and manifest.complete(path):
            path.rename(whole)
        else:
            shutil.rmtree(path)
            gone.append(path.name)
    return gone


def sync(path: pathlib.Path) -> None:
    """Waits until the names in a folder are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such thing
            raise
    finally:
        os.close(file)

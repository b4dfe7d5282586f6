"""From the newest checkpoint back to the first that is good, saying what is wrong with others."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from models.checkpoint import agree, restoring, retention
from models.checkpoint.damage import Damage, Damaged


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state that was saved.

    Args:
      step: of the checkpoint.
      state: the tree of arrays, each where it was asked for.
      extra: what was saved with it.
      skipped: what is wrong with the newer checkpoints, the newest first.
      filled: optional fields that the checkpoint did not have.
      dropped: optional fields that the checkpoint has, and this run has not.
    """

    step: int
    state: Any
    extra: dict[str, Any]
    skipped: list[Damage]
    filled: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def newest_good(
    folder: pathlib.Path,
    steps: Sequence[int],
    like: Any,
    identity: Mapping[str, Any],
    optional: Mapping[str, Any],
    *,
    strict: bool,
    say: Callable[[str], None],
) -> Restored:
    """The newest of these checkpoints that is good; see `Folder.restore`.

    Args:
      folder: of all checkpoints.
      steps: which ones, oldest first.
      like, identity, optional: what to restore.
      strict: raise if the newest is damaged.
      say: is told of each damage.

    Raises:
      Damaged: if none is good, or the newest is not and it is `strict`.
      Mismatch: if one is another run's.
    """
    skipped: list[Damage] = []
    for step in reversed(steps):
        path = retention.path_of(folder, step)
        found = restoring.restore(path, step, like, identity, optional)
        if isinstance(found, restoring.Found):
            return Restored(step, found.state, found.extra, skipped, found.filled, found.dropped)
        skipped += found
        if strict:
            raise Damaged(f"{path} is damaged, and was not restored:", skipped)
        for damage in found:
            say(f"WARNING: {damage}")
    raise Damaged(
        f"none of the {len(steps)} checkpoints in {folder} is good. To begin anew, choose another "
        "folder:",
        skipped,
    )


def set_aside(folder: pathlib.Path, found: Restored, *, say: Callable[[str], None]) -> None:
    """Renames the checkpoints that were skipped: their steps will be trained and saved anew.

    Args:
      folder: of all checkpoints.
      found: what was restored instead of them.
      say: is told what is lost.
    """
    worse = sorted({damage.step for damage in found.skipped})
    if not worse:
        return
    say(
        f"WARNING: continuing from step {found.step}: {worse[-1] - found.step} steps are lost, and "
        f"will be trained again. Damaged checkpoints are kept as NUMBER.{retention.DAMAGED}"
    )
    if jax.process_index() == 0:
        try:
            for step in worse:
                retention.set_aside(retention.path_of(folder, step))
        except OSError as error:  # they are replaced when their steps are saved anew
            say(f"WARNING: a damaged checkpoint keeps its name: {error}")
    agree.first(None)  # when a process goes on, none of them sees the damaged ones any more

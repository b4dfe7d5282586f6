"""Where a run is, what a checkpoint says of it, and how it goes on or goes back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from models import guard
from models.checkpoint import Folder
from models.config import Config
from models.state import State

# A run that keeps an average of its parameters from now on begins it as they are.
OPTIONAL = {"ema": "params"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is; what of it the state does not know is saved beside the state, as JSON.

    Args:
      step: how many steps were made.
      batch: the number of the next batch: as many as steps, and those that rollbacks left out.
      rollbacks: how often the run went back.
      chain: the chain of fingerprints so far.
      data: what the data were like, for a run that goes on to compare.
    """

    step: int = 0
    batch: int = 0
    rollbacks: int = 0
    chain: str = ""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


def identity(config: Config) -> dict[str, Any]:
    """What a run that continues this one must have in common with it: not mesh, steps, folders."""
    same: dict[str, Any] = {
        "model": dataclasses.asdict(config.model),
        "optim": dataclasses.asdict(config.optim),
        "loss": config.loss,
        "batch": config.batch,
        "seed": config.seed,
    }
    # How the numbers are computed may change, and what else is made of them.
    for part, names in (("model", ("remat", "unroll")), ("optim", ("accumulate", "ema"))):
        for name in names:
            del same[part][name]
    plain: dict[str, Any] = json.loads(json.dumps(same, default=str))
    return plain


def resume(folder: Folder | None, described: State) -> tuple[State, Place] | None:
    """The newest state that is good, and where the run is; None where there is nothing saved.

    Args:
      folder: the run's checkpoints; None: it keeps none.
      described: shapes, dtypes and places of the state.

    Raises:
      Damaged, Mismatch: as `Folder.restore`.
    """
    if folder is None:
        return None
    found = folder.restore(described, optional=OPTIONAL)
    if found is None:
        return None
    return found.state, Place(step=found.step, **found.extra)


def go_back(
    folder: Folder | None, described: State, config: Config, at: Place, good: int
) -> tuple[State | None, Place]:
    """The newest state without the bad steps, and where that is: with later batches to come.

    Args:
      folder, described: as for `resume`.
      config: the run.
      at: where the run is.
      good: the step after which they began.

    Returns:
      The state, or None if there is no such checkpoint: the run begins anew, with later batches.
    """
    state, place = None, Place()
    if folder is not None:
        folder.discard_after(good)
        state, place = resume(folder, described) or (state, place)
    later = guard.resume_at(config.guard, at.batch - 1)
    return state, dataclasses.replace(place, batch=later, rollbacks=at.rollbacks + 1)


def extra(at: Place, data: dict[str, Any]) -> dict[str, Any]:
    """What is saved beside the state; `resume` reads it."""
    fields = dataclasses.asdict(dataclasses.replace(at, data=data))
    del fields["step"]
    return fields

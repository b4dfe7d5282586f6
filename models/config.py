"""What one training run is: a frozen value, all of it changeable from the command line."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

from models import vit
from models.checkpoint import Checkpoints
from models.data import Data
from models.devices import Cut
from models.guard import Guard
from models.loss import Kind
from models.optim import Optim
from models.reporting.config import Report
from models.start import Start
from models.watch.config import Watch


def _sizes(texts: list[str]) -> tuple[int, int, int]:
    data, fsdp, tensor = (int(size) for size in texts[0].split(","))
    return data, fsdp, tensor


MeshSizes = Annotated[
    tuple[int, int, int],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="DATA,FSDP,TENSOR",
        instance_from_str=_sizes,
        is_instance=lambda value: isinstance(value, tuple) and len(value) == 3,
        str_from_instance=lambda sizes: [",".join(str(size) for size in sizes)],
    ),
]


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run.

    Raises:
      ValueError: if a number makes no sense, whatever the machine.
    """

    model: vit.Config
    """the model"""
    optim: Optim
    """the optimiser and its schedule"""
    steps: int
    """steps in the whole run; each is an update of the parameters, unless the guard skips it"""
    batch: int
    """images of one step, on all devices together"""
    data: Data = dataclasses.field(default_factory=Data)
    """where images come from, and what happens to them"""
    loss: Kind = "sigmoid"
    """sigmoid: each class for itself, as the paper; softmax: one class of all"""
    guard: Guard = dataclasses.field(default_factory=Guard)
    """which steps are not applied, and when to go back or to give up"""
    statistics: int = 0
    """report attention's largest logit and least entropy, and the gradients' norms, by block, every
    so many steps: by a second program, since attention's fast one has no logits; 0: never"""
    start: Start = dataclasses.field(default_factory=Start)
    """what the first parameters are, where the seed does not make them"""
    seed: int = 0
    """what initial parameters, order and augmentation are drawn from"""
    mesh: MeshSizes = (1, 1, 1)
    """devices on the axes data, fsdp and tensor; 1,1,1 is one device without a mesh"""
    layout: Cut = "tokens"
    """what the tensor axis cuts between layers: tokens, the rows of the batch, or features"""
    algorithm: str | None = None
    """how the collective matmuls travel; None: the cost model chooses"""
    backend: str | None = None
    """what runs them; None: the cost model chooses"""
    evaluate: int = 100
    """steps from one evaluation to the next; the last step is evaluated too"""
    checkpoint: Checkpoints = dataclasses.field(default_factory=Checkpoints)
    """when the state is saved, and how many are kept; a run goes on from the newest by itself"""
    watch: Watch = dataclasses.field(default_factory=Watch)
    """the other processes, preemption, stalls and silent damage"""
    report: Report = dataclasses.field(default_factory=Report)
    """what is told beside metrics, and left at the end"""
    out: pathlib.Path = pathlib.Path("runs")
    """the folder that metrics, checkpoints, weights and figures go to"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.statistics < 0:
            raise ValueError(f"statistics={self.statistics}: 0 is never, n every n steps")
        if min(self.mesh) < 1:
            raise ValueError(f"mesh={self.mesh}: the sizes must be at least 1; 1,1,1 is one device")
        saved, compared = self.checkpoint.every, self.watch.replicas_every
        if saved and compared and saved % compared:
            raise ValueError(
                f"watch.replicas_every={compared} does not divide checkpoint.every={saved}: states "
                "would be saved whose copies were not compared"
            )

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(self.mesh)

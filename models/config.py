"""What one training run is: a frozen value, all of it changeable from the command line."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Annotated, Literal

from tyro.constructors import PrimitiveConstructorSpec

from models import vit
from models.data import Augment
from models.loss import Kind
from models.optim import Optim


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
    """updates of the parameters"""
    batch: int
    """images of one update, on all devices together"""
    augment: Augment
    """how training images are changed"""
    loss: Kind = "sigmoid"
    """sigmoid: each class for itself, as the paper; softmax: one class of all"""
    seed: int = 0
    """what initial parameters, order and augmentation are drawn from"""
    mesh: MeshSizes = (1, 1, 1)
    """devices on the axes data, fsdp and tensor; 1,1,1 is one device without a mesh"""
    layout: Literal["tokens", "features"] = "tokens"
    """what the tensor axis cuts between layers"""
    algorithm: str | None = None
    """how the collective matmuls travel; None: the cost model chooses"""
    backend: str | None = None
    """what runs them; None: the cost model chooses"""
    evaluate: int = 100
    """steps from one evaluation to the next; the last step is evaluated too"""
    out: pathlib.Path = pathlib.Path("runs")
    """the folder that metrics, weights and figures go to"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if min(self.mesh) < 1:
            raise ValueError(f"mesh={self.mesh}: the sizes must be at least 1; 1,1,1 is one device")

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(self.mesh)

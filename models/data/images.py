"""What every source of images offers: numbered samples, each a picture and its labels."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import NamedTuple, Protocol

import numpy as np

Batch = dict[str, np.ndarray]
Rows = slice | np.ndarray
Shape = tuple[int, int, int]

PADDING = -1  # the label, or each of the labels, of a row that only fills a batch; its index too
BLANK = -1.0  # the background of an image
# What randomness is for, so that no two uses share a stream.
ORDER, SHIFTS, CROPS, MIXES, SYNTHETIC = range(5)


class Unreadable(ValueError):
    """A sample that cannot be read; the text names file and record."""


class Sample(NamedTuple):
    """One sample before anything happens to it.

    Args:
      picture: the bytes of an image file, or [height, width, channels] float32 in [-1, 1].
      labels: its classes, in [0, classes); none where it has no label.
      name: what an error calls it.
    """

    picture: bytes | np.ndarray
    labels: tuple[int, ...]
    name: str


class Split(Protocol):
    """The training images, or the test images: samples by number, in no order.

    A split is read by threads, and is pickled to the processes that decode.
    """

    @property
    def shape(self) -> Shape:
        """Height, width and channels of an image as a step sees it."""

    @property
    def classes(self) -> int | None:
        """How many classes there are; None: the images have no labels."""

    @property
    def columns(self) -> int:
        """How wide a row of labels is where it has a column for each class: at least `classes`."""

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""

    @property
    def fingerprint(self) -> str:
        """What changes when a sample, its number or its labels do; from names and sizes, cheap."""

    def __len__(self) -> int:
        """How many samples there are."""

    def read(self, sample: int) -> Sample:
        """A sample by its number.

        Raises:
          Unreadable: if it cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class Images:
    """A split in memory, of images that all have the size that a step sees, with one label each.

    Args:
      images: [n, height, width, channels] float32 in [-1, 1].
      labels: [n] int32 in [0, classes).
      classes: how many classes there are.
      width: the columns of labels that have a column for each class; None: `classes`.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: int
    width: int | None = None
    multilabel: bool = dataclasses.field(default=False, init=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> Shape:
        """Height, width and channels of each image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    @property
    def columns(self) -> int:
        """See `Split`."""
        return self.width or self.classes

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `Split`; here of all pixels."""
        return digest(self.images.tobytes(), self.labels.tobytes())

    def read(self, sample: int) -> Sample:
        """See `Split`."""
        return Sample(self.images[sample], (int(self.labels[sample]),), f"image {sample}")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a run asks of its images.

    Args:
      shape: height, width and channels of an image as the model takes it.
      classes: how many classes the model tells apart, or None: as many as there are.
      seed: what images that are drawn are drawn from.
    """

    shape: Shape
    classes: int | None
    seed: int

    def columns(self, found: int) -> int:
        """The columns of labels where the images have `found` classes.

        Raises:
          ValueError: if the model tells fewer apart.
        """
        if self.classes is not None and self.classes < found:
            raise ValueError(
                f"num_classes={self.classes} are too few: the images have {found} classes"
            )
        return self.classes or found


def digest(*parts: bytes | str) -> str:
    """16 hexadecimal digits that stand for the parts."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()[:16]

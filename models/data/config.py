"""What images a run reads and how it changes them: frozen values, fields of a run's config."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Augment:
    """How a training image is changed; the default leaves it as an evaluation sees it.

    Args:
      pixels: how far an image is shifted at most, in each direction, over a blank background.
      share: how many of the images are shifted, from 0 to 1.
      crop: whether the image is an inception crop: a random part of the picture, resized.
      area: how much of the picture an inception crop covers, at least and at most, from 0 to 1.
      aspect: its width by its height, at least and at most.
      flip: whether every other image, at random, is mirrored left to right.

    Raises:
      ValueError: if these are no such numbers.
    """

    pixels: int = 0
    share: float = 1.0
    crop: bool = False
    area: tuple[float, float] = (0.05, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.pixels < 0:
            raise ValueError(f"pixels={self.pixels} must be at least 0")
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share={self.share} must be from 0 to 1")
        if not 0.0 < self.area[0] <= self.area[1] <= 1.0:
            raise ValueError(f"area={self.area} must rise, from above 0 to at most 1")
        if not 0.0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect={self.aspect} must rise, from above 0")


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from, and what happens to them until a step sees them.

    Raises:
      ValueError: if a number makes no sense.
    """

    source: str = "digits"
    """digits, synthetic, folder or records: a file of models/data/sources"""
    path: pathlib.Path | None = None
    """the folder of images (folder) or of shards (records)"""
    test_path: pathlib.Path | None = None
    """the same of the test images; None: a fixed share of `path` is held out"""
    held_out: int = 10
    """without a test path, every `held_out`-th image is a test image"""
    labels: pathlib.Path | None = None
    """folder: a JSON or CSV file with the labels of each image; None: class folders, if any"""
    test_labels: pathlib.Path | None = None
    """folder: the same of the images of `test_path`"""
    hierarchy: pathlib.Path | None = None
    """folder: a JSON or CSV file with the parents of labels, which an image is given as well"""
    samples: int = 10_000
    """synthetic: how many training images; an eighth as many are test images"""
    targets: int = 1
    """synthetic: labels of an image; more than one makes it multi-label"""
    augment: Augment = Augment()
    """how training images are changed"""
    mixup: float = 0.0
    """MixUp's alpha, of the distribution beta(alpha, alpha); 0: none"""
    mixup_per: Literal["batch", "row"] = "batch"
    """whether a batch or each of its rows has a weight of its own"""
    central: float = 0.875
    """how much of the picture's shorter side an evaluation sees, in its middle"""
    workers: int = 0
    """processes that read and decode; 0: threads of this process"""
    threads: int = 2
    """threads that read and decode, where there are no workers; each makes whole batches ahead"""
    skip_bad_records: bool = False
    """an unreadable image becomes a row that counts nowhere, and is logged; else it is an error"""

    def __post_init__(self) -> None:
        for name, least in (("held_out", 2), ("samples", 1), ("targets", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must be at least 0")
        if not 0.0 <= self.mixup < float("inf"):
            raise ValueError(f"mixup={self.mixup} must be at least 0, and finite")
        if not 0.0 < self.central <= 1.0:
            raise ValueError(f"central={self.central} must be above 0 and at most 1")

    def refuse(self, *names: str) -> None:
        """What a source does not read must not be set: it would be forgotten in silence.

        Args:
          names: fields that mean nothing here.

        Raises:
          ValueError: if one of them is set.
        """
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} means nothing to the source {self.source!r}; "
                    "set the source that reads it, such as 'folder'"
                )

"""Test images from a source that has none: every k-th image, always the same ones."""

from __future__ import annotations

import dataclasses

from models.data.images import Sample, Shape, Split


@dataclasses.dataclass(frozen=True)
class Part:
    """The images of a split that are held out, or the others.

    Where the images are sorted by class, each class is held out in the same proportion.

    Args:
      whole: the split.
      every: each `every`-th image is held out, the first one too.
      held_out: whether these are the images held out, or all others.
    """

    whole: Split
    every: int
    held_out: bool

    def __len__(self) -> int:
        held_out = -(-len(self.whole) // self.every)
        return held_out if self.held_out else len(self.whole) - held_out

    @property
    def shape(self) -> Shape:
        """See `Split`."""
        return self.whole.shape

    @property
    def classes(self) -> int | None:
        """See `Split`."""
        return self.whole.classes

    @property
    def columns(self) -> int:
        """See `Split`."""
        return self.whole.columns

    @property
    def multilabel(self) -> bool:
        """See `Split`."""
        return self.whole.multilabel

    @property
    def fingerprint(self) -> str:
        """See `Split`."""
        part = "held out" if self.held_out else "kept"
        return f"{self.whole.fingerprint}, {part} of {self.every}"

    def read(self, sample: int) -> Sample:
        """See `Split`."""
        if self.held_out:
            return self.whole.read(sample * self.every)
        return self.whole.read(sample + sample // (self.every - 1) + 1)


def parted(whole: Split, every: int) -> tuple[Split, Split]:
    """The images kept for training, and those held out.

    Raises:
      ValueError: if there is only one image.
    """
    if len(whole) < 2:
        raise ValueError(f"{len(whole)} image is not enough to hold out some; set a test path")
    return Part(whole, every, held_out=False), Part(whole, every, held_out=True)

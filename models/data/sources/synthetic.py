"""Images drawn by their numbers, of any size, which a model can learn: nothing to download.

Each class is a texture, a sum of a few waves drawn for it. An image shows the textures of its
labels, moved and dimmed at random, under noise; its labels are drawn from its number.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from models.data.config import Data
from models.data.images import SYNTHETIC, Sample, Shape, Wanted, digest

CLASSES = 10  # where the model does not say how many
WAVES = 4  # of a texture, in each colour
NOISE = 0.25  # its standard deviation, where a texture has at most 1
TEXTURE, IMAGE = 0, 1
TEST = 2**40  # test images have numbers from here on


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """A split of such images.

    Args:
      shape: height, width and channels.
      classes: how many textures there are.
      targets: labels of each image.
      samples: how many images.
      first: the number of the first one.
      seed: what all of it is drawn from.
    """

    shape: Shape
    classes: int
    targets: int
    samples: int
    first: int
    seed: int

    def __len__(self) -> int:
        return self.samples

    @property
    def columns(self) -> int:
        """See `Split`."""
        return self.classes

    @property
    def multilabel(self) -> bool:
        """See `Split`."""
        return self.targets > 1

    @property
    def fingerprint(self) -> str:
        """See `Split`."""
        return digest("synthetic", repr(self))

    def read(self, sample: int) -> Sample:
        """See `Split`."""
        random = np.random.default_rng((SYNTHETIC, self.seed, IMAGE, self.first + sample))
        labels = tuple(random.choice(self.classes, self.targets, replace=False).tolist())
        height, width, _ = self.shape
        picture = random.standard_normal(self.shape, np.float32) * np.float32(NOISE)
        for label in labels:
            down, right = random.integers(0, (height, width))
            strength = np.float32(random.uniform(0.5, 1.0) / self.targets**0.5)
            moved = np.roll(_texture(self.shape, label, self.seed), (down, right), axis=(0, 1))
            picture += strength * moved
        return Sample(np.clip(picture, -1.0, 1.0), labels, f"synthetic image {sample}")


@functools.lru_cache(maxsize=256)
def _texture(shape: Shape, label: int, seed: int) -> np.ndarray:
    """Waves that fit a whole number of times into the image: it can be moved round its edges."""
    random = np.random.default_rng((SYNTHETIC, seed, TEXTURE, label))
    height, width, channels = shape
    y, x = np.arange(height)[:, None] / height, np.arange(width)[None, :] / width
    planes = []
    for _ in range(channels):
        down, right = random.integers(-4, 5, size=(2, WAVES))
        phase = random.uniform(0, 2 * np.pi, WAVES)
        waves = [
            np.cos(2 * np.pi * (a * y + b * x) + c)
            for a, b, c in zip(down, right, phase, strict=True)
        ]
        planes.append(sum(waves) / WAVES)
    return np.stack(planes, axis=-1).astype(np.float32)


def splits(config: Data, wanted: Wanted) -> tuple[Synthetic, Synthetic]:
    """See `sources.splits`.

    Raises:
      ValueError: if an image is to have more labels than there are classes, or files are named.
    """
    config.refuse("path", "test_path", "labels", "test_labels", "hierarchy")
    classes = wanted.classes or CLASSES
    if config.targets > classes:
        raise ValueError(
            f"targets={config.targets} labels an image are more than {classes} classes"
        )
    train = Synthetic(wanted.shape, classes, config.targets, config.samples, 0, wanted.seed)
    tests = max(config.samples // 8, 1)
    return train, dataclasses.replace(train, samples=tests, first=TEST)

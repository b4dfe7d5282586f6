"""How training images are changed, drawn from (seed, step, row): the same whoever makes a row.

A crop is drawn as a box and done while the picture is resized; a shift moves images that are made.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from models.data.config import Augment
from models.data.images import BLANK, CROPS, SHIFTS

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the picture
ATTEMPTS = 100


def inception_box(
    width: int,
    height: int,
    random: np.random.Generator,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Box:
    """A random part of a picture; all of it where none as wanted fits.

    The aspect is uniform within its range; so is the height within that for which the area is in
    its range and the width fits; so is the place.

    Args:
      width, height: of the picture.
      random: what it is drawn from.
      area: least and largest share of the picture.
      aspect: least and largest width / height.

    Reference: C. Szegedy et al., *Going Deeper with Convolutions*, arXiv 1409.4842, section 6, as
    TensorFlow's `sample_distorted_bounding_box` draws it.
    """
    for _ in range(ATTEMPTS):
        ratio = random.uniform(*aspect)
        least, most = (round((share * width * height / ratio) ** 0.5) for share in area)
        most = min(most, height, int(width / ratio))
        if least > most or most < 1:
            continue
        tall = int(random.integers(max(least, 1), most, endpoint=True))
        wide = min(max(round(tall * ratio), 1), width)
        if area[0] * width * height <= wide * tall <= area[1] * width * height:
            left = int(random.integers(0, width - wide, endpoint=True))
            top = int(random.integers(0, height - tall, endpoint=True))
            return left, top, left + wide, top + tall
    return 0, 0, width, height


def central_box(width: int, height: int, *, aspect: float, share: float) -> Box:
    """The largest part of a picture of a given form, around its middle, and of that a share.

    Args:
      width, height: of the picture.
      aspect: width / height of the part.
      share: how much of each side is kept.
    """
    wide, tall = share * min(width, height * aspect), share * min(height, width / aspect)
    left, top = (width - wide) / 2, (height - tall) / 2
    return left, top, left + wide, top + tall


def row_generator(seed: int, step: int, row: int) -> np.random.Generator:
    """What the crop and the flip of a row are drawn from."""
    return np.random.default_rng((CROPS, seed, step, row))


def offsets(augment: Augment, batch: int, *, seed: int, step: int) -> np.ndarray:
    """How far each row of the whole batch is shifted, down and to the right: [batch, 2]."""
    random = np.random.default_rng((SHIFTS, seed, step))
    drawn = random.integers(-augment.pixels, augment.pixels, size=(batch, 2), endpoint=True)
    drawn[random.random(batch) >= augment.share] = 0
    return drawn


def shift(images: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Moves each image by its offsets, over a blank background.

    Args:
      images: [b, height, width, channels].
      offsets: [b, 2] integers, how far down and to the right.

    Returns:
      As images.
    """
    far = int(np.abs(offsets).max(initial=0))
    padded = np.pad(images, ((0, 0), (far, far), (far, far), (0, 0)), constant_values=BLANK)
    windows = sliding_window_view(padded, images.shape[1:3], axis=(1, 2))
    down, right = far - offsets.T
    return np.moveaxis(windows[np.arange(len(images)), down, right], 1, -1)

"""Images in memory, and what each step sees of them: a function of (seed, step), without state.

An epoch is a permutation of the samples drawn from (seed, epoch); the epochs follow each other in
one endless stream, and step i takes the i-th batch of it. So each sample is seen exactly once per
epoch, also where the batch does not divide the number of samples, and a run that stops can go on
anywhere. Augmentation is drawn from (seed, step) for the whole batch, so that a process that reads
a part of the batch makes the same pixels as one that reads all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import sklearn.datasets
import sklearn.model_selection
from numpy.lib.stride_tricks import sliding_window_view

Batch = dict[str, np.ndarray]
Rows = slice | np.ndarray
PADDING = -1  # the label of a row that only fills a batch
BLANK = -1.0  # the background of an image
ORDER, SHIFTS = 0, 1  # what randomness is for, so that no two uses share a stream


@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images.

    Args:
      images: [n, height, width, channels] float32 in [-1, 1].
      labels: [n] int32 in [0, classes).
      classes: how many classes there are.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: int

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random shifts.

    Args:
      pixels: how far an image moves at most, in each direction.
      share: how many of the images move, from 0 to 1.

    Raises:
      ValueError: if these are no such numbers.
    """

    pixels: int = 0
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.pixels < 0:
            raise ValueError(f"pixels={self.pixels} must be at least 0")
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share={self.share} must be from 0 to 1")


def digits() -> tuple[Images, Images]:
    """1,437 train and 360 test images of handwritten digits, 8 x 8 x 1, the split always the same.

    Each class is split in the same proportion. Reference: E. Alpaydin and C. Kaynak, *Optical
    Recognition of Handwritten Digits*, UCI 1998, https://doi.org/10.24432/C50P49, the test part,
    as scikit-learn carries it.
    """
    source = sklearn.datasets.load_digits()
    images = (source.images[..., None] / 8.0 - 1.0).astype(np.float32)
    labels = source.target.astype(np.int32)
    train, test = sklearn.model_selection.train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    return Images(images[train], labels[train], 10), Images(images[test], labels[test], 10)


def order(samples: int, batch: int, *, seed: int, step: int) -> np.ndarray:
    """Which samples step `step` sees: [batch] int64."""
    epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), samples)
    return np.concatenate(
        [
            np.random.default_rng((ORDER, seed, epoch)).permutation(samples)[
                places[epochs == epoch]
            ]
            for epoch in np.unique(epochs).tolist()
        ]
    )


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


def train_batch(
    data: Images,
    batch: int,
    augment: Augment,
    *,
    seed: int,
    step: int,
    rows: Rows = slice(None),
) -> Batch:
    """What step `step` trains on.

    Args:
      data: the training images.
      batch: rows of the global batch.
      augment: how images are changed.
      seed, step: what order and augmentation are drawn from.
      rows: which rows of the global batch to make.

    Returns:
      "image": [rows, height, width, channels] float32, "label": [rows] int32.
    """
    chosen = order(len(data), batch, seed=seed, step=step)[rows]
    random = np.random.default_rng((SHIFTS, seed, step))
    offsets = random.integers(-augment.pixels, augment.pixels, size=(batch, 2), endpoint=True)
    offsets[random.random(batch) >= augment.share] = 0
    return {"image": shift(data.images[chosen], offsets[rows]), "label": data.labels[chosen]}


def eval_batches(data: Images, batch: int, *, rows: Rows = slice(None)) -> Iterator[Batch]:
    """All images once, in order; the last batch is filled up with blank ones labelled `PADDING`.

    Args:
      data: the test images.
      batch: rows of each global batch.
      rows: which rows of each global batch to make.
    """
    missing = -len(data) % batch
    images = np.pad(data.images, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=BLANK)
    labels = np.pad(data.labels, (0, missing), constant_values=PADDING)
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        yield {"image": images[part][rows], "label": labels[part][rows]}

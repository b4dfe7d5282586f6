"""The rows of a step: read, decoded, changed and labelled, as a function of (seed, step)."""

from __future__ import annotations

import dataclasses

import numpy as np

from models.data import augment as augmenting
from models.data import mixup
from models.data.augment import inception_box
from models.data.config import Augment, Data
from models.data.epochs import order
from models.data.images import BLANK, PADDING, Batch, Rows, Split, Unreadable
from models.data.pictures import BoxOf, image

Skipped = dict[int, str]  # what was not readable: sample and reason


@dataclasses.dataclass(frozen=True)
class Made:
    """Some rows of a batch.

    Args:
      images: [n, height, width, channels] float32.
      labels: the classes of each row.
      index: [n] int64, the sample that each row shows, PADDING where it shows none.
      skipped: the samples that were not readable.
    """

    images: np.ndarray
    labels: list[tuple[int, ...]]
    index: np.ndarray
    skipped: Skipped


def training_batch(
    split: Split, config: Data, batch: int, *, seed: int, step: int, rows: Rows = slice(None)
) -> tuple[Batch, Skipped]:
    """What step `step` trains on.

    Args:
      split: the training images.
      config: how they are changed.
      batch: rows of the global batch.
      seed, step: what order and changes are drawn from.
      rows: which rows of the global batch to make.

    Returns:
      "image": [rows, height, width, channels] float32, "label": [rows] int32, or
      [rows, columns] float32 where images have several labels or are mixed, "index": [rows] int64;
      and which samples were skipped, where `config` says so.

    Raises:
      Unreadable: if a sample is not readable, and `config` says nothing.
    """
    rows = np.arange(batch)[rows]
    # A row and its partner are often both asked for, and then made once.
    wanted = np.union1d(rows, mixup.partners(rows, batch)) if config.mixup else rows
    samples = order(len(split), batch, seed=seed, step=step, rows=wanted)
    changes = config.augment
    boxes: list[BoxOf | None] = [None] * len(wanted)
    flips = np.zeros(len(wanted), bool)
    if changes.crop or changes.flip:
        for place, row in enumerate(wanted.tolist()):
            random = augmenting.row_generator(seed, step, row)
            flips[place] = changes.flip and random.random() < 0.5
            boxes[place] = _cropping(random, changes) if changes.crop else None
    made = _make(split, config, samples, boxes)
    images = made.images
    images[flips] = images[flips, :, ::-1]
    if changes.pixels:
        offsets = augmenting.offsets(changes, batch, seed=seed, step=step)
        images = augmenting.shift(images, offsets[wanted])
    if not config.mixup:
        return {"image": images, "label": _labels(split, made), "index": made.index}, made.skipped
    own = np.searchsorted(wanted, rows)
    other = np.searchsorted(wanted, mixup.partners(rows, batch))
    weight = mixup.weights(config, batch, seed=seed, step=step)[rows]
    # A row that fills the batch is mixed with nothing, and nothing with it.
    weight = np.where((made.index[own] < 0) | (made.index[other] < 0), np.float32(1), weight)
    labels = _hot(split, made)
    mixed = {
        "image": mixup.blend(images[own], images[other], weight),
        "label": mixup.blend(labels[own], labels[other], weight),
        "index": made.index[own],
    }
    return mixed, made.skipped


def evaluation_batch(
    split: Split, config: Data, batch: int, *, step: int, rows: Rows = slice(None)
) -> tuple[Batch, Skipped]:
    """The `step`-th batch of all images in order; blank rows fill up the last one.

    Args, returns and raises as `training_batch`: labels are never mixed, and those of a row that
    fills the batch are PADDING.
    """
    samples = (np.arange(batch) + step * batch)[rows]
    samples = np.where(samples < len(split), samples, PADDING)
    made = _make(split, config, samples, [None] * len(samples))
    batch_of = {"image": made.images, "label": _labels(split, made), "index": made.index}
    return batch_of, made.skipped


def train_batch(
    data: Split,
    batch: int,
    augment: Augment,
    *,
    seed: int,
    step: int,
    rows: Rows = slice(None),
) -> Batch:
    """`training_batch` here and now, without a pipeline, as the device sees it: no index.

    Args:
      data: the training images.
      batch: rows of the global batch.
      augment: how images are changed.
      seed, step: what order and augmentation are drawn from.
      rows: which rows of the global batch to make.
    """
    made, _ = training_batch(data, Data(augment=augment), batch, seed=seed, step=step, rows=rows)
    return {"image": made["image"], "label": made["label"]}


def _cropping(random: np.random.Generator, changes: Augment) -> BoxOf:
    return lambda width, height: inception_box(
        width, height, random, area=changes.area, aspect=changes.aspect
    )


def _make(split: Split, config: Data, samples: np.ndarray, boxes: list[BoxOf | None]) -> Made:
    images = np.full((len(samples), *split.shape), BLANK, np.float32)
    labels: list[tuple[int, ...]] = [()] * len(samples)
    index, skipped = samples.astype(np.int64), {}
    for row, sample in enumerate(samples.tolist()):
        if sample < 0:
            continue
        try:
            read = split.read(sample)
            images[row] = image(read, split.shape, boxes[row], config.central)
            labels[row] = read.labels
        except Unreadable as error:
            if not config.skip_bad_records:
                raise
            index[row], skipped[sample] = PADDING, str(error)
    return Made(images, labels, index, skipped)


def _labels(split: Split, made: Made) -> np.ndarray:
    """[rows] int32 of single labels, else `_hot`."""
    if split.multilabel:
        return _hot(split, made)
    return np.array([labels[0] if labels else PADDING for labels in made.labels], np.int32)


def _hot(split: Split, made: Made) -> np.ndarray:
    """[rows, columns] float32: 1 for each label of a row, all PADDING where it shows no sample."""
    hot = np.zeros((len(made.labels), split.columns), np.float32)
    for row, labels in enumerate(made.labels):
        hot[row, list(labels)] = 1.0
    hot[made.index < 0] = PADDING
    return hot

"""Handwritten digits, 8 x 8 x 1, which come with scikit-learn: nothing to download."""

from __future__ import annotations

import dataclasses

import numpy as np

from models.data.config import Data
from models.data.images import Images, Wanted


def digits() -> tuple[Images, Images]:
    """1,437 train and 360 test images of handwritten digits, 8 x 8 x 1, the split always the same.

    Each class is split in the same proportion. Reference: E. Alpaydin and C. Kaynak, *Optical
    Recognition of Handwritten Digits*, UCI 1998, https://doi.org/10.24432/C50P49, the test part,
    as scikit-learn carries it.
    """
    # Not above: every process that decodes imports this package, and this takes it a second or two.
    import sklearn.datasets
    import sklearn.model_selection

    source = sklearn.datasets.load_digits()
    images = (source.images[..., None] / 8.0 - 1.0).astype(np.float32)
    labels = source.target.astype(np.int32)
    train, test = sklearn.model_selection.train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    return Images(images[train], labels[train], 10), Images(images[test], labels[test], 10)


def splits(config: Data, wanted: Wanted) -> tuple[Images, Images]:
    """See `sources.splits`.

    Raises:
      ValueError: if the model takes images of another size, or tells fewer classes apart; or if
        files are named.
    """
    config.refuse("path", "test_path", "labels", "test_labels", "hierarchy")
    train, test = digits()
    if wanted.shape != train.shape:
        ours, theirs = (" x ".join(str(size) for size in x) for x in (train.shape, wanted.shape))
        raise ValueError(
            f"the source {config.source!r} has images of {ours}, and the model takes {theirs}; set "
            "--model.image-size 8 --model.channels 1, or use another source"
        )
    width = wanted.columns(train.classes)
    return dataclasses.replace(train, width=width), dataclasses.replace(test, width=width)

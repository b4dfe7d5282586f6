"""The data of a run: images from any source, as batches that depend on (seed, step) alone.

train, test = splits(config, image_shape=(224, 224), channels=3, classes=1000, seed=0)
with stream(train, config, batch=1024, seed=0, rows=rows, start=step) as batches:
    batch = next(batches)
"""

from __future__ import annotations

from models.data.augment import shift
from models.data.batches import train_batch
from models.data.config import Augment, Data
from models.data.epochs import order
from models.data.images import PADDING, Batch, Images, Rows, Split, Unreadable
from models.data.pipeline import Stream, eval_batches, stream
from models.data.sources import splits
from models.data.sources.digits import digits

__all__ = [
    "Data",
    "Augment",
    "Split",
    "Images",
    "Batch",
    "Rows",
    "PADDING",
    "Unreadable",
    "splits",
    "digits",
    "stream",
    "Stream",
    "eval_batches",
    "train_batch",
    "order",
    "shift",
]

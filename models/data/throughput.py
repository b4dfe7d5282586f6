"""How many images a second this machine reads and decodes, to compare with what a step eats.

The images are generated: JPEGs whose spectrum falls like that of photographs, so that they are as
large and as slow to decode. Random as they are, no cache of decoded images would help.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import pathlib
import time

import numpy as np
from PIL import Image

from models.data.batches import training_batch
from models.data.config import Augment, Data
from models.data.images import Split
from models.data.pipeline import stream
from models.data.sources import splits

FALL = 1.2  # of the amplitude with the frequency; photographs have about 1
SPREAD = 40.0  # standard deviation of the pixels, of 255


@dataclasses.dataclass(frozen=True)
class Rate:
    """What was measured.

    Args:
      images: how many were made, after the first batches.
      seconds: what they took.
    """

    images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """What is compared with a step."""
        return self.images / self.seconds


def photographs(root: pathlib.Path, count: int, size: tuple[int, int], *, quality: int = 90) -> int:
    """Writes JPEGs into one class folder.

    Args:
      root: where the folder is made.
      count: how many images.
      size: width and height.
      quality: of the JPEGs.

    Returns:
      The bytes of all of them.
    """
    width, height = size
    folder = root / "photograph"
    folder.mkdir(parents=True)
    down, right = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    fall = 1 / np.maximum(np.hypot(down, right), 1 / max(size)) ** FALL
    written = 0
    for number in range(count):
        noise = np.random.default_rng(number).standard_normal((3, height, width))
        planes = np.fft.irfft2(np.fft.rfft2(noise) * fall, s=(height, width))
        scaled = 128 + SPREAD * planes / planes.std(axis=(1, 2), keepdims=True)
        pixels = np.moveaxis(np.clip(scaled, 0, 255).astype(np.uint8), 0, -1)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        (folder / f"{number:05}.jpg").write_bytes(file.getvalue())
        written += len(file.getvalue())
    return written


def reading(path: pathlib.Path, resolution: int, config: Data) -> tuple[Split, Data]:
    """The training images below a folder, as an ImageNet run reads them: cropped and flipped.

    Args:
      path: a folder of images.
      resolution: height and width of an image as a step sees it.
      config: threads and workers.
    """
    config = dataclasses.replace(
        config, source="folder", path=path, augment=Augment(crop=True, flip=True)
    )
    train, _ = splits(
        config, image_shape=(resolution, resolution), channels=3, classes=None, seed=0
    )
    return train, config


def alone(split: Split, config: Data, batch: int, batches: int) -> Rate:
    """One thread that does nothing but make batches, without a pipeline: what a core can do.

    Args:
      split, config: from `reading`.
      batch: images of a batch.
      batches: how many to make.
    """
    training_batch(split, config, batch, seed=0, step=0)
    began = time.perf_counter()
    for step in range(1, batches + 1):
        training_batch(split, config, batch, seed=0, step=step)
    return Rate(batch * batches, time.perf_counter() - began)


def streamed(split: Split, config: Data, batch: int, batches: int) -> Rate:
    """The pipeline, to a consumer that takes no time.

    Args:
      split, config: from `reading`; how many threads or workers.
      batch: images of a batch.
      batches: how many to time, after those that the pipeline began with.
    """
    with stream(split, config, batch, seed=0) as steps:
        for _ in itertools.islice(steps, 2 * max(config.workers, config.threads)):
            pass
        began = time.perf_counter()
        for _ in itertools.islice(steps, batches):
            pass
        return Rate(batch * batches, time.perf_counter() - began)

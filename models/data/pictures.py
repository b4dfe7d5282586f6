"""A part of a picture, decoded and resized in one go, as the float32 that a step sees."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from models.data.augment import Box, central_box
from models.data.images import Sample, Shape, Unreadable

BoxOf = Callable[[int, int], Box]

# A JPEG is decoded at a half, a quarter or an eighth of its size where the part that is wanted
# still has this many times the pixels asked for, on each side: much faster, and hardly different.
RESERVE = 2
# What a file may be, whatever its name: Pillow has readers that start other programs.
FORMATS = ("JPEG", "PNG", "WEBP")


def image(sample: Sample, shape: Shape, box_of: BoxOf | None, central: float) -> np.ndarray:
    """What a step sees of a sample.

    Args:
      sample: from a split. A picture in memory has the size already.
      shape: height, width and channels to make.
      box_of: says which part of a picture of some width and height is wanted; None: its middle.
      central: how much of the shorter side the middle is.

    Returns:
      [height, width, channels] float32 in [-1, 1].

    Raises:
      Unreadable: if it is not an image.
    """
    picture = sample.picture
    if isinstance(picture, np.ndarray):
        height, width = picture.shape[:2]
        return picture if box_of is None else resized_array(picture, box_of(width, height), shape)
    height, width, _ = shape
    with _decoding(picture, sample.name) as opened:
        if box_of is None:
            box = central_box(*opened.size, aspect=width / height, share=central)
        else:
            box = box_of(*opened.size)
        return resized(opened, box, shape)


def check(sample: Sample) -> None:
    """Decodes a picture for its own sake.

    Raises:
      Unreadable: if it is not an image.
    """
    if isinstance(sample.picture, bytes):
        with _decoding(sample.picture, sample.name) as opened:
            opened.load()


@contextlib.contextmanager
def _decoding(picture: bytes, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(picture), formats=FORMATS) as opened:
            yield opened
    except Exception as error:  # whatever a decoder makes of damaged bytes
        raise Unreadable(f"{name} is not a readable image: {error}") from error


def resized(picture: Image.Image, box: Box, shape: Shape) -> np.ndarray:
    """A part of a picture, bilinear with antialiasing.

    Args:
      picture: an image file that was opened; its pixels are read here.
      box: which part, in pixels of the picture.
      shape: height, width and channels to make: 1 channel is grey, 3 are red, green and blue.

    Returns:
      [height, width, channels] float32 in [-1, 1].
    """
    height, width, channels = shape
    mode = {1: "L", 3: "RGB"}[channels]
    left, top, right, bottom = box
    full = picture.size
    if picture.format == "JPEG" and picture.mode in ("L", "RGB"):
        scale = RESERVE * max(width / (right - left), height / (bottom - top))
        if scale < 1:
            picture.draft(picture.mode, (int(full[0] * scale), int(full[1] * scale)))
    if picture.mode.startswith("I;16"):  # which Pillow would cut off at 255 instead of scaling
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    shrunk = picture.size[0] / full[0], picture.size[1] / full[1]
    part = (left * shrunk[0], top * shrunk[1], right * shrunk[0], bottom * shrunk[1])
    image = picture.convert(mode).resize((width, height), Image.Resampling.BILINEAR, box=part)
    return np.asarray(image, np.float32).reshape(shape) / np.float32(127.5) - np.float32(1.0)


def resized_array(picture: np.ndarray, box: Box, shape: Shape) -> np.ndarray:
    """`resized` for [height, width, channels] float32, of as many channels as `shape` says."""
    height, width, _ = shape
    planes = [
        Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR, box=box)
        for plane in np.moveaxis(picture, -1, 0)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)

"""Where images come from: one file each, whose name is the `source` of a config.

A file defines `splits(config, wanted)`, which returns the training and the test images.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import cast

from models.data.config import Data
from models.data.images import Split, Wanted


def names() -> tuple[str, ...]:
    """The sources there are: the files of this folder."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def splits(
    config: Data,
    *,
    image_shape: tuple[int, int],
    channels: int,
    classes: int | None,
    seed: int,
) -> tuple[Split, Split]:
    """The training and the test images of a source.

    Args:
      config: which source, and what it needs.
      image_shape: height and width of an image as the model takes it.
      channels: its colours.
      classes: how many classes the model tells apart; None: as many as the images have.
      seed: what images that are drawn are drawn from.

    Raises:
      ValueError: if there is no such source, or it cannot give what the model takes.
    """
    if config.source not in names():
        close = difflib.get_close_matches(config.source, names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names())}"
        raise ValueError(
            f"no source {config.source!r}: there is no models/data/sources/{config.source}.py; "
            f"{hint}"
        )
    module = importlib.import_module(f"{__name__}.{config.source}")
    wanted = Wanted((*image_shape, channels), classes, seed)
    return cast(tuple[Split, Split], module.splits(config, wanted))

"""Images through a tower, batch by batch, the next one on its way while the last is fetched."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from models.data import PADDING, Data, Split, eval_batches
from models.data.sources.folder import Folder
from models.features.tower import Tower
from models.placing import place, rows_held


def extract(
    tower: Tower,
    split: Split,
    data: Data,
    batch: int,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[list[str], dict[str, np.ndarray]]]:
    """The activations of all images, in order.

    Args:
      tower: the model.
      split: the images.
      data: how they are read.
      batch: images at a time, on all devices together.
      start, stop: the numbers of the first batch, and of the one that is not made any more.

    Returns:
      An iterator of (names, arrays), one pair for each batch: the images' names; each activation by
      name, [images, ...]; "index", [images] int64, their numbers in the split; "label", as the
      split has them. Of several processes each gets the images that its devices hold.

    Raises:
      ValueError: if the batch does not split over the mesh.
      Unreadable: if an image is, and `data` does not skip such.
    """
    names = names_of(split, data)
    rows = rows_held(tower.layout, batch)
    made = eval_batches(split, data, batch, rows=rows, start=start)
    running: tuple[dict[str, np.ndarray], dict[str, jax.Array]] | None = None
    with contextlib.closing(made):  # type: ignore[type-var]
        for rows_of in itertools.islice(made, None if stop is None else stop - start):
            images = place({"image": rows_of["image"]}, tower.layout)["image"]
            known = {"index": rows_of["index"], "label": rows_of["label"]}
            before, running = running, (known, tower(images))
            if before is not None:
                yield _fetched(names, *before)
    if running is not None:
        yield _fetched(names, *running)


def names_of(split: Split, data: Data) -> Sequence[str]:
    """What each image is called: its path in its folder, else a number."""
    if isinstance(split, Folder):
        return split.catalogue.names
    return [f"{data.source}/{number}" for number in range(len(split))]


def _fetched(
    names: Sequence[str], known: dict[str, np.ndarray], found: dict[str, jax.Array]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """On this host, without the rows that only fill the batch."""
    arrays = known | {name: _own_rows(x) for name, x in found.items()}
    real = known["index"] != PADDING
    return (
        [names[number] for number in known["index"][real].tolist()],
        {name: x[real] for name, x in arrays.items()},
    )


def _own_rows(x: jax.Array) -> np.ndarray:
    """The rows that this process holds."""
    if x.is_fully_addressable:
        return np.asarray(x)
    pieces = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])

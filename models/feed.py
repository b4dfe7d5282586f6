"""The batches of a run on its devices, from any step on, and from another after a rollback."""

from __future__ import annotations

from typing import Any

import numpy as np

from collective_matmul import Layout
from models import data, placing
from models.config import Config
from models.placing import Placed
from models.watch import fingerprint


class Feed:
    """Takes batches from the data's stream and places them; a context manager.

    Args:
      images: the training images.
      config: batch, seed, and how images are read.
      layout: where arrays lie, or None for one device.
      rows: which rows of a global batch this process brings.
      start: the number of the first batch.
      like: what the data of the run that goes on were like, from `state`; empty for a new run.

    Raises:
      ValueError: if the data are others than those of the run that goes on.
    """

    def __init__(
        self,
        images: data.Split,
        config: Config,
        layout: Layout | None,
        rows: np.ndarray,
        *,
        start: int,
        like: dict[str, Any],
    ) -> None:
        self._images, self._config, self._layout, self._rows = images, config, layout, rows
        self._stream = self._open(start)
        if like:
            self._stream.check(like)
        self._first: data.Batch | None = None

    def first(self) -> Placed:
        """The batch that `next` will give, to compile for."""
        if self._first is None:
            self._first = next(self._stream)
        return placing.place(without_index(self._first), self._layout)

    def next(self, marked: bool) -> tuple[Placed, dict[str, Any], float]:
        """The next batch.

        Args:
          marked: whether to mark which samples it has, for the chain of fingerprints.

        Returns:
          The batch; {"batch": a fingerprint of the samples' numbers} if asked for; and the seconds
          that it was waited for.
        """
        before = self._stream.waited
        batch, self._first = self._first or next(self._stream), None
        marks = {}
        if marked:
            numbers = {"index": batch["index"].astype(np.int32)}
            marks["batch"] = fingerprint.marks(placing.place(numbers, self._layout))
        placed = placing.place(without_index(batch), self._layout)
        return placed, marks, self._stream.waited - before

    @property
    def step(self) -> int:
        """The number of the batch that `next` will give."""
        return self._stream.step - (self._first is not None)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data, as JSON."""
        return self._stream.state() | {"step": self.step}

    def jump(self, start: int) -> None:
        """Goes on with the batch of this number."""
        self._stream.close()
        self._stream, self._first = self._open(start), None

    def _open(self, start: int) -> data.Stream:
        config = self._config
        return data.stream(
            self._images, config.data, config.batch, seed=config.seed, rows=self._rows, start=start
        )

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def without_index(batch: data.Batch) -> data.Batch:
    """A batch without the numbers of its samples, which no device needs."""
    return {name: rows for name, rows in batch.items() if name != "index"}

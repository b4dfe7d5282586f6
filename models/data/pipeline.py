"""The batches of a run, made ahead of the steps by threads or processes: grain's pipelines.

A pipeline's elements are whole batches, numbered by their steps. Each is a function of its number,
so a run goes on at any step, and neither threads, workers nor processes change what a step sees.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Self

import grain
import grain.experimental
import numpy as np
from absl import flags

from models.data.batches import Skipped, evaluation_batch, training_batch
from models.data.config import Data
from models.data.images import Batch, Rows, Split
from models.data.workers import settle

ENDLESS = 2**62  # steps, of which a run makes as many as it wants
SHARED = 2**20  # bytes
LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Batches by their numbers, as grain reads a source.

    Args:
      make: the batch of a step, and what was not readable.
      count: how many steps there are.
    """

    make: Callable[[int], tuple[Batch, Skipped]]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> tuple[Batch, Skipped]:
        return self.make(step)


class Stream:
    """The batches of steps `start`, `start + 1`, ...; a context manager, as workers must end.

    Args:
      steps: all batches.
      config: how many threads or workers make them.
      start: the first step.
      identity: what a run that goes on must have in common with the one before.
    """

    def __init__(
        self, steps: Steps, config: Data, start: int = 0, identity: dict[str, Any] | None = None
    ) -> None:
        self.step = start
        """the step of the next batch"""
        self.waited = 0.0
        """seconds that `next` took so far: the steps waited for their data"""
        self.skipped: Skipped = {}
        """the samples that were not readable so far, and why"""
        self._identity = identity or {}
        self._iterator = iter(_pipeline(steps, config, start))
        self._iterator.start_prefetch()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            batch, skipped = next(self._iterator)
        except Exception:
            self.close()  # after an error, grain's next batch would not be that of the next step
            raise
        self.waited += time.perf_counter() - began
        for sample in sorted(skipped.keys() - self.skipped.keys()):
            LOG.warning("step %d goes without sample %d: %s", self.step, sample, skipped[sample])
        self.skipped |= skipped
        self.step += 1
        # What comes from a worker lies in memory shared with it, in a subclass that jax refuses.
        return {name: np.asarray(rows) for name, rows in batch.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: the next step, and what `check` compares."""
        return {"step": self.step, **self._identity}

    def check(self, state: dict[str, Any]) -> None:
        """Compares with the data of the run that is to go on.

        Args:
          state: from `state`, of that run.

        Raises:
          ValueError: if these are others: the samples would not be seen once per epoch each.
        """
        other = {
            name: (state.get(name), mine)
            for name, mine in self._identity.items()
            if state.get(name) != mine
        }
        if other:
            told = "; ".join(f"{name} was {old}, is {new}" for name, (old, new) in other.items())
            raise ValueError(f"the data are not those of the run that is to go on: {told}")

    def close(self) -> None:
        """Ends threads and workers."""
        self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def stream(
    split: Split,
    config: Data,
    batch: int,
    *,
    seed: int,
    rows: Rows = slice(None),
    start: int = 0,
) -> Stream:
    """The training batches of the steps from `start` on, without end.

    Args:
      split: the training images.
      config: how they are read and changed.
      batch: rows of the global batch.
      seed: what order and changes are drawn from.
      rows: which rows of each global batch to make.
      start: the first step.

    Returns:
      An iterator of batches, see `training_batch`; next raises `Unreadable` as that does.

    Raises:
      ValueError: if images without labels are to be mixed.
    """
    if config.mixup and split.classes is None:
        raise ValueError(f"mixup={config.mixup} mixes labels, and the images have no labels")
    make = _Training(split, config, batch, seed, rows)
    identity = {
        "fingerprint": split.fingerprint,
        "samples": len(split),
        "batch": batch,
        "seed": seed,
    }
    return Stream(Steps(make, ENDLESS), config, start, identity)


def eval_batches(
    split: Split, config: Data, batch: int, *, rows: Rows = slice(None), start: int = 0
) -> Generator[Batch, None, None]:
    """All images once, in order; the last batch is filled up with blank ones labelled `PADDING`.

    Args:
      split: the test images.
      config: how they are read.
      batch: rows of each global batch.
      rows: which rows of each global batch to make.
      start: the number of the first batch.
    """
    make = _Evaluation(split, config, batch, rows)
    with Stream(Steps(make, -(-len(split) // batch)), config, start) as batches:
        yield from batches


def _pipeline(steps: Steps, config: Data, start: int) -> grain.IterDataset:
    if config.workers == 0:
        # grain warns of a buffer that is smaller than the threads are many.
        reading = grain.ReadOptions(config.threads, config.threads)
        return grain.MapDataset.source(steps)[start:].to_iter_dataset(reading)
    alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    processes = grain.multiprocessing.MultiprocessingOptions(
        num_workers=config.workers, per_worker_buffer_size=1
    )
    batches = grain.MapDataset.source(steps)[start:].to_iter_dataset(alone)
    if not flags.FLAGS.is_parsed():  # grain's defaults, where nobody parses a command line by absl
        flags.FLAGS.mark_as_parsed()
    # Less than this is sent; more is shared, at the price of a file for each array.
    sharing = grain.experimental.DatasetOptions(min_shm_size=SHARED)
    batches = grain.experimental.WithOptionsIterDataset(batches, sharing)
    return batches.mp_prefetch(processes, worker_init_fn=settle)


@dataclasses.dataclass(frozen=True)
class _Training:
    split: Split
    config: Data
    batch: int
    seed: int
    rows: Rows

    def __call__(self, step: int) -> tuple[Batch, Skipped]:
        return training_batch(
            self.split, self.config, self.batch, seed=self.seed, step=step, rows=self.rows
        )


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    split: Split
    config: Data
    batch: int
    rows: Rows

    def __call__(self, step: int) -> tuple[Batch, Skipped]:
        return evaluation_batch(self.split, self.config, self.batch, step=step, rows=self.rows)

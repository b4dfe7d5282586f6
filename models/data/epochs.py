"""Which samples a step sees: a function of (seed, step), without state.

An epoch is a permutation of the samples drawn from (seed, epoch); the epochs follow each other in
one endless stream, and step i takes the i-th batch of it. So each sample is seen exactly once per
epoch, also where the batch does not divide the number of samples, and a run that stops can go on
anywhere, on any number of processes.
"""

from __future__ import annotations

import functools

import numpy as np
from grain.experimental import index_shuffle

from models.data.images import ORDER, Rows

IN_MEMORY = 2**20  # a permutation of more samples is computed place by place: it is never held
LARGEST = 2**32 - 1  # which places grain's permutation has


def order(
    samples: int, batch: int, *, seed: int, step: int, rows: Rows = slice(None)
) -> np.ndarray:
    """Which samples step `step` sees: [rows] int64.

    Args:
      samples: how many there are.
      batch: rows of the global batch.
      seed: what the order of each epoch is drawn from.
      step: which step.
      rows: which rows of the batch to tell.

    Raises:
      ValueError: if there are none, or more than a permutation has places for.
    """
    if not 0 < samples <= LARGEST:
        raise ValueError(f"{samples} samples cannot be ordered: there must be 1 to {LARGEST}")
    epochs, places = np.divmod((np.arange(batch) + step * batch)[rows], samples)
    found = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        found[epochs == epoch] = _taken(samples, seed, epoch, places[epochs == epoch])
    return found


def _taken(samples: int, seed: int, epoch: int, places: np.ndarray) -> np.ndarray:
    if samples <= IN_MEMORY:
        return _permutation(samples, seed, epoch)[places]
    key = int(np.random.SeedSequence((ORDER, seed, epoch)).generate_state(1)[0])
    return np.array(
        [index_shuffle(place, samples - 1, key, rounds=4) for place in places.tolist()], np.int64
    )


@functools.lru_cache(maxsize=4)
def _permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((ORDER, seed, epoch)).permutation(samples)

"""What several processes must know of one another, so that all of them do the same.

`exchange` is a collective of the devices: the main threads call it in the same order as their
steps. `barrier` goes through the coordinator instead, and may wait in the background meanwhile.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils


def exchange(value: Any) -> list[Any]:
    """The value of each process, in the order of their numbers.

    Args:
      value: what JSON can say, of any length.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    with jax.transfer_guard("allow"):
        lengths = multihost_utils.process_allgather(np.array([text.size], np.int32)).reshape(-1)
        padded = np.zeros(int(lengths.max()), np.uint8)
        padded[: text.size] = text
        rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [
        json.loads(bytes(row[:length].tolist()))
        for row, length in zip(np.asarray(rows), lengths.tolist(), strict=True)
    ]


def first(value: Any) -> Any:
    """The value of the first process, which all others take for theirs."""
    return exchange(value)[0]


def barrier(key: str, seconds: float) -> None:
    """Waits until every process is here.

    Args:
      key: a name that was never used before.
      seconds: how long to wait.

    Raises:
      jax.errors.JaxRuntimeError: if one does not come.
    """
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=int(seconds * 1000))

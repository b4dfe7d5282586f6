"""What a process that decodes does first: it lives exactly as long as the process it works for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def settle(index: int, count: int) -> None:
    """Ties this worker to its parent.

    A signal to leave is the parent's business: it may want the batches up to the step at which all
    processes leave together, and then ends its workers. A parent that was killed cannot, so each
    worker watches for it: or else it would wait for ever, with its share of the memory.

    Args:
      index, count: which worker this is, of how many; as grain calls it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(
        target=_follow, name=f"parent of worker {index} of {count}", daemon=True
    ).start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

"""Numbers of a run, one JSON object a line, written as they come."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any, TextIO


class Metrics:
    """The records of a run so far, and the file that gets them; made by `writing`."""

    def __init__(self, file: TextIO) -> None:
        self.records: list[dict[str, Any]] = []
        self._file = file

    def write(self, **record: Any) -> None:
        """Adds a line; what is not finite becomes null, as JSON has no name for it."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self.records.append(finite)
        self._file.write(json.dumps(finite) + "\n")


@contextlib.contextmanager
def writing(path: pathlib.Path | None) -> Iterator[Metrics]:
    """A new metrics file, open for as long as the block lasts.

    Args:
      path: the file to make, or to empty. None keeps the records without writing them.
    """
    with open(path or os.devnull, "w", encoding="utf-8", buffering=1) as file:
        yield Metrics(file)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

"""Numbers of a run, kept as records and given to every sink as they come.

A sink that fails is told once and left alone from then on: a full disk or a lost mount must not end
a run of a month.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from models.files import atomically

Record = dict[str, Any]


class Sink(Protocol):
    """Where records go."""

    name: str

    def write(self, record: Record) -> None:
        """Takes a record. Raises whatever it likes."""

    def close(self) -> None:
        """Ends."""


class Metrics:
    """The records of a run so far, and the sinks that get them; made by `writing`.

    Args:
      sinks: where records go.
      records: those of an earlier attempt that this one continues.
      say: is told of a sink that fails.
    """

    def __init__(
        self, sinks: Sequence[Sink], records: Sequence[Record], say: Callable[[str], None]
    ) -> None:
        self.records = list(records)
        self._sinks = list(sinks)
        self._say = say

    def write(self, **record: Any) -> None:
        """Adds a record; what is not finite becomes null, as JSON has no name for it."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self.records.append(finite)
        for sink in list(self._sinks):
            self._try(sink, functools.partial(sink.write, finite))

    def close(self) -> None:
        """Ends all sinks."""
        for sink in list(self._sinks):
            self._try(sink, sink.close)

    def _try(self, sink: Sink, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a sink is made of, the run is worth more
            self._sinks.remove(sink)
            self._say(
                f"WARNING: {sink.name} takes no more numbers ({type(error).__name__}: {error}); "
                "training goes on without it"
            )


class JsonLines:
    """One JSON object a line.

    Args:
      path: the file to make, or to replace by the records that are kept.
      kept: records that it begins with.
    """

    def __init__(self, path: pathlib.Path, kept: Sequence[Record]) -> None:
        self.name = str(path)
        with atomically(path) as draft:
            draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Record) -> None:
        """A line, there as soon as this returns."""
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Every number of a record as a scalar of its step.

    Args:
      folder: gets the event files. One run's attempts add files to it.
      resumed: the step that this attempt continues from; TensorBoard hides what came after it.
    """

    def __init__(self, folder: pathlib.Path, resumed: int) -> None:
        from tensorboardX import SummaryWriter

        self.name = str(folder)
        self._writer = SummaryWriter(str(folder), purge_step=resumed + 1 if resumed else None)

    def write(self, record: Record) -> None:
        """A scalar for each number."""
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


@contextlib.contextmanager
def writing(
    folder: pathlib.Path | None,
    *,
    resumed: int = 0,
    tensorboard: bool = False,
    say: Callable[[str], None],
) -> Iterator[Metrics]:
    """The metrics of a run, open for as long as the block lasts.

    Args:
      folder: gets `metrics.jsonl`, and the other sinks' files. None keeps records in memory alone.
      resumed: the step that the run continues from. Records of later steps, which an earlier
        attempt left, are dropped: these steps are made again.
      tensorboard: whether TensorBoard gets the numbers too.
      say: is told of a sink that fails.
    """
    kept: list[Record] = []
    makers: list[Callable[[], Sink]] = []
    if folder is not None:
        path = folder / "metrics.jsonl"
        if resumed and path.is_file():
            kept = [record for record in read(path) if record["step"] <= resumed]
        makers.append(lambda: JsonLines(path, kept))
        if tensorboard:
            makers.append(lambda: TensorBoard(folder / "tensorboard", resumed))
    sinks = []
    for make in makers:
        try:
            sinks.append(make())
        except Exception as error:  # as in `Metrics`: not a reason to end a run
            say(f"WARNING: {type(error).__name__}: {error}; training goes on without these numbers")
    metrics = Metrics(sinks, kept, say)
    try:
        yield metrics
    finally:
        metrics.close()


def read(path: pathlib.Path) -> list[Record]:
    """The records of a file of JSON lines; a last line that was cut off by a crash is left out."""
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise
    return records

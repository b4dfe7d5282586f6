"""A timeline as a trace in Chrome's JSON format, which ui.perfetto.dev opens.

Every lane is a thread. Of a loop the first trip is written out, and one event stands for the
others, so that a step of 48 layers stays small.

Reference: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from collective_matmul.inspect.timeline import COMPUTE, COPIES, Timeline

LOOPS = "loops"
_US = 1e6


def trace(timeline: Timeline, path: str | os.PathLike[str], title: str) -> None:
    """Writes a timeline as a trace.

    Args:
      timeline: what to write.
      path: of the JSON file.
      title: the name of the process in the trace.
    """
    spans = sorted(_spans(timeline, 0.0, 1), key=lambda span: (span["ts"], -span["dur"]))
    lanes = {span["lane"] for span in spans}
    network = sorted(lanes - {LOOPS, COMPUTE, COPIES})
    order = [lane for lane in (LOOPS, COMPUTE, *network, COPIES) if lane in lanes]
    names = [("process_name", 0, title)]
    names += [("thread_name", number, lane) for number, lane in enumerate(order, 1)]
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": name, "pid": 1, "tid": tid, "args": {"name": value}}
        for name, tid, value in names
    ]
    events += [
        {"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": i, "args": {"sort_index": i}}
        for i in range(1, len(order) + 1)
    ]
    for span in spans:
        events.append({"ph": "X", "pid": 1, "tid": order.index(span.pop("lane")) + 1, **span})
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"displayTimeUnit": "ms", "traceEvents": events}, file)


def _spans(timeline: Timeline, start: float, runs: int) -> Iterator[dict[str, Any]]:
    for event in timeline.events:
        args = {"from": event.op_name, "runs": runs}
        yield _span(event.lane, event.name, event.kind, start + event.start, event.seconds, args)
    for loop in timeline.loops:
        begin, one = start + loop.start, loop.body.seconds
        args = {"trips": loop.trips, "seconds": loop.seconds}
        yield _span(LOOPS, f"{loop.name}, trip 1 of {loop.trips}", "loop", begin, one, args)
        if loop.trips > 1:
            rest = loop.seconds - one
            name = f"{loop.name}, {loop.trips - 1} more trips like the first"
            yield _span(LOOPS, name, "loop", begin + one, rest, args)
        yield from _spans(loop.body, begin, runs * loop.trips)


def _span(
    lane: str, name: str, kind: str, start: float, seconds: float, args: dict[str, Any]
) -> dict[str, Any]:
    timing = {"ts": start * _US, "dur": seconds * _US}
    return {"lane": lane, "name": name, "cat": kind, **timing, "args": args}

"""How far the predictions are from what others measured: published programs, compiled and predicted
as any other.

    error = predicted seconds / published seconds - 1

The published programs are compiled by the compiler that is installed, which is newer than the one
that they were measured with, so a part of an error is the compiler's progress.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bench.predicted import kernels, reproductions
from bench.predicted.points import Point
from bench.predicted.slices import tpu_slice
from bench.record import Record
from bench.tables import markdown
from collective_matmul import hardware


@dataclasses.dataclass(frozen=True)
class Result:
    """A point and its prediction, in seconds of one repeat."""

    point: Point
    predicted: float
    exposed: float  # of it, waiting for collectives
    uncosted: int  # ops that nothing is known of, and that count no time

    @property
    def error(self) -> float:
        """Relative; above 0 the prediction is slower than what was measured."""
        return self.predicted / self.point.seconds - 1

    def __str__(self) -> str:
        published, predicted = time(self.point.seconds), time(self.predicted)
        told = f"predicted {predicted}, published {published}: {self.error:+.1%}"
        return f"{self.point.chip} {self.point.name}: {told}"

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it; `restored` reads it."""
        point = self.point
        return {
            "key": key(point),
            "chip": point.chip,
            "name": point.name,
            "published_seconds": point.seconds,
            "predicted_seconds": self.predicted,
            "exposed_seconds": self.exposed,
            "uncosted": self.uncosted,
            "error": self.error,
            "inferred": point.inferred,
            "source": point.source,
        }


def key(point: Point) -> str:
    """What identifies a point: all that its prediction depends on, and the published value."""
    arguments = ",".join(f"{name}={value}" for name, value in point.arguments.items())
    options = ",".join(f"{name}={value}" for name, value in point.options.items())
    return f"{point.topology} {point.program}({arguments}) {options} {point.value} {point.unit}"


def predict(point: Point) -> Result:
    """Compiles the program of a point for its slice, and predicts it.

    Raises:
      UserError: if the TPU compiler is not installed.
    """
    build = getattr(reproductions, point.program)
    mesh, lowered = build(tpu_slice(point.topology), **point.arguments)
    compiled = lowered.compile(compiler_options=dict(point.options) or None)
    report, _ = kernels.overlap(compiled, mesh, point.options)
    return Result(
        point,
        report.seconds / point.repeats,
        report.exposed_seconds / point.repeats,
        len(report.uncosted),
    )


def restored(points: Iterable[Point], rows: Iterable[dict[str, Any]]) -> list[Result]:
    """The results of an earlier run, of those points that are the same today."""
    earlier = {row["key"]: row for row in rows}
    return [
        Result(point, row["predicted_seconds"], row["exposed_seconds"], row["uncosted"])
        for point in points
        if (row := earlier.get(key(point))) is not None
    ]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The errors of several points, regardless of their sign."""

    points: int
    median_error: float
    worst_error: float
    bias: float  # the median with its sign

    @classmethod
    def of(cls, results: Sequence[Result]) -> Summary | None:
        """None of no results."""
        if not results:
            return None
        errors = [result.error for result in results]
        sizes = [abs(error) for error in errors]
        return cls(len(sizes), statistics.median(sizes), max(sizes), statistics.median(errors))


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """`{"chips": {name: ..}, "overall": .., "stated": .., "points": [..]}`.

    `stated` counts only the points whose source leaves nothing open.
    """

    def told(some: Sequence[Result]) -> dict[str, Any] | None:
        found = Summary.of(some)
        return None if found is None else dataclasses.asdict(found)

    chips = dict.fromkeys(result.point.chip for result in results)
    return {
        "chips": {chip: told([x for x in results if x.point.chip == chip]) for chip in chips},
        "overall": told(results),
        "stated": told([x for x in results if not x.point.inferred]),
        "points": [result.as_dict() for result in results],
    }


def comparison(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Rows for a table, a chip after the other."""
    order = {name: i for i, name in enumerate(hardware.names())}
    return [
        {
            "chip": x.point.chip,
            "program": x.point.name + (" (inferred)" if x.point.inferred else ""),
            "published us": x.point.seconds * 1e6,
            "predicted us": x.predicted * 1e6,
            "error %": 100 * x.error,
        }
        for x in sorted(results, key=lambda x: order[x.point.chip])
    ]


def page(results: Sequence[Result], points: Sequence[Point], record: Record) -> str:
    """The tables of docs/calibration.md, as Markdown."""
    told = summary(results)
    groups = {**told["chips"], "all": told["overall"], "all, nothing inferred": told["stated"]}
    errors = [
        {
            "chip": name,
            "points": some["points"],
            "median error %": 100 * some["median_error"],
            "worst error %": 100 * some["worst_error"],
            "median with its sign %": 100 * some["bias"],
        }
        for name, some in groups.items()
        if some is not None
    ]
    inferred: dict[str, list[str]] = {}
    for x in results:
        if x.point.inferred:
            inferred.setdefault(x.point.inferred, []).append(f"{x.point.chip} {x.point.name}")
    sources: dict[str, list[str]] = {}
    for point in points:
        sources.setdefault(point.source, []).append(point.name)
    return "\n".join(
        [
            f"{record}.",
            "",
            markdown(errors),
            "",
            markdown(comparison(results)),
            "",
            "*Inferred*, because the source leaves it open:",
            "",
            *(f"- {_few(names)}: {why}" for why, names in inferred.items()),
            "",
            "Not counted:",
            "",
            *(
                f"- {p.chip} {p.name}, {p.value:g} {p.unit}: {p.excluded}."
                for p in points
                if p.excluded
            ),
            "",
            "Sources:",
            "",
            *(f"- <{source}>: {_few(names)}." for source, names in sources.items()),
        ]
    )


def _few(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}, and {len(names) - 1} more"


def time(seconds: float) -> str:
    """A time as a reader wants it: 4 digits, in us, ms or s."""
    scale, unit = next(
        ((s, u) for s, u in ((1.0, "s"), (1e-3, "ms")) if seconds >= s), (1e-6, "us")
    )
    return f"{seconds / scale:.4g} {unit}"

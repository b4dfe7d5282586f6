"""Compares predictions with published measurements, and writes docs/calibration.md.

python -m bench calibrate                      # all that compiles in seconds; keeps the others
python -m bench calibrate --slow               # whole training steps too, minutes each
python -m bench calibrate --only "all-gather"  # shows these, and writes nothing
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
from collections.abc import Sequence

from bench.asking import read
from bench.commands import UserError
from bench.predicted.calibration import Result, comparison, key, page, predict, restored, summary
from bench.predicted.points import POINTS
from bench.predicted.slices import compile_only
from bench.record import RESULTS, ROOT, Record, load

PATH = RESULTS / "calibration.json"
PAGE = ROOT / "docs" / "calibration.md"
BEGIN, END = (
    "% tables of python -m bench calibrate: begin",
    "% tables of python -m bench calibrate: end",
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compare, and where to write it."""

    only: str = ""
    """a regular expression: compare the points whose chip and name it matches, and write nothing"""
    slow: bool = False
    """compile whole training steps too; else their last predictions are kept"""
    results: pathlib.Path = PATH
    """the JSON file"""
    page: pathlib.Path = PAGE
    """the documentation page whose tables are replaced"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    asked = read(Arguments, "calibrate", None, arguments)
    compile_only()
    chosen = [p for p in POINTS if p.program and re.search(asked.only, f"{p.chip} {p.name}")]
    if not chosen:
        raise UserError(f"--only {asked.only!r} matches none of {len(POINTS)} points")
    kept: dict[str, Result] = {}
    if asked.results.exists() and not asked.slow:
        rows = load(asked.results).result["points"]
        kept = {key(x.point): x for x in restored((p for p in chosen if p.slow), rows)}
    results = []
    for point in chosen:
        if point.slow and not asked.slow and key(point) not in kept:
            print(f"{point.chip} {point.name}: takes minutes; --slow compiles it", file=sys.stderr)
            continue
        results.append(kept.get(key(point)) or predict(point))
        print(results[-1], flush=True)
    if asked.only or not results:
        return 0
    told = summary(results)
    shown = {"title": "Calibration", "order": 40, "rows": comparison(results)}
    record = Record("predicted", "calibrate", "TPU", {**shown, **told})
    record.save(asked.results)
    text = asked.page.read_text(encoding="utf-8")
    asked.page.write_text(replaced(text, page(results, POINTS, record)), encoding="utf-8")
    print(f"wrote {asked.results} and {asked.page}")
    return 0


def replaced(text: str, tables: str) -> str:
    """A page with other tables between its marks.

    Raises:
      UserError: if the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the page has no line {(END if begin else BEGIN)!r}")
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"

"""Writes docs/benchmarks.md and its pictures from all results in bench/results.

python -m bench report [--check]
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from bench import report
from bench.commands import UserError
from bench.record import RESULTS, ROOT
from models.files import atomically

PAGE = ROOT / "docs" / "benchmarks.md"


def main(arguments: Sequence[str]) -> int:
    """Writes the page; or with --check says whether it is what the results give."""
    parser = argparse.ArgumentParser("python -m bench report", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 if it is not current"
    )
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of records")
    parser.add_argument("--page", type=pathlib.Path, default=PAGE, help="the page to write")
    asked = parser.parse_args(arguments)
    try:
        found = report.sections(asked.results)
        text = report.page(found)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not asked.check:
        with atomically(asked.page) as draft:
            draft.write_text(text, encoding="utf-8")
        made = report.pictures(found, asked.page.parent)
        print(f"wrote {asked.page} of {len(found)} results, with {len(made)} pictures")
        return 0
    wanted = [name for x in found for name, _ in (*x.drawn(), *x.copied())]
    missing = [name for name in wanted if not asked.page.with_name(name).exists()]
    if not asked.page.exists() or asked.page.read_text(encoding="utf-8") != text or missing:
        print(f"{asked.page} is not what {asked.results} gives: run `python -m bench report`")
        return 1
    return 0

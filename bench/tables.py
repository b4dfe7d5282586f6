"""Rows of results as a table, aligned, that is Markdown as well.

A row is a flat dictionary: its keys are the headings, with the unit in them, in reading order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DIGITS = 4  # significant ones of a number that was measured or modelled
Row = Mapping[str, Any]


def cell(value: Any) -> str:
    """A value as a reader wants it: 4 significant digits, thousands apart, "-" for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value).replace("|", "\\|").replace("\n", " ")
    if value == 0 or 1e-3 <= abs(value) < 10**DIGITS:
        return f"{value:.{DIGITS}g}"
    return f"{value:,.0f}" if 10**DIGITS <= abs(value) < 1e9 else f"{value:.{DIGITS - 1}e}"


def headings(rows: Sequence[Row]) -> list[str]:
    """Every key of the rows, in the order of their first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, numbers to the right; "" where there are none."""
    if not rows:
        return ""
    names = headings(rows)
    cells = [[cell(row.get(name)) for name in names] for row in rows]
    right = [
        all(not isinstance(row.get(name), (str, bool)) for row in rows) and name != names[0]
        for name in names
    ]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]

    def line(texts: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(texts, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = (
        "-" * (width + 1) + ":" if to_right else "-" * (width + 2)
        for width, to_right in zip(widths, right, strict=True)
    )
    return "\n".join([line(names), f"|{'|'.join(rule)}|", *map(line, cells)])

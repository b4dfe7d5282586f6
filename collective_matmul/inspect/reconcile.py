"""Reconcile or refuse: a report found what the program is known to hold, or it is an error."""

from __future__ import annotations


class ReconciliationError(ValueError):
    """What a report found in a program is not what the program should hold."""


def check(what: str, found: float, expected: float, tolerance: float) -> None:
    """Compares two numbers.

    Args:
      what: they count.
      found: in the text of the program.
      expected: from another source: its jaxpr, a closed form.
      tolerance: relative to `expected`.

    Raises:
      ReconciliationError: with both numbers, if they are further apart.
    """
    if abs(found - expected) <= tolerance * abs(expected):
        return
    off = f"{found / expected - 1:+.2%}" if expected else "not 0"
    raise ReconciliationError(
        f"{what}: the program's text holds {found:,.0f}, and {expected:,.0f} were expected "
        f"({off}, tolerance {tolerance:.2%})"
    )

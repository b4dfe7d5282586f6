"""Keeps a run going: `python -m models.supervise [--restarts N] [--processes N] -- COMMAND ...`.

Starts COMMAND, and again when it is killed or fails, with all of its local processes together. The
command goes on from its newest checkpoint by itself. A status that starting again does not change
(`models/watch/status.py`) ends the supervision, and so does a SIGTERM, which the processes get too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from models.watch.supervisor import Supervision, supervise


def main(arguments: Sequence[str]) -> int:
    """What the command line asks for. Returns the status to end with."""
    ours, command = split(arguments)
    how = tyro.cli(Supervision, prog="python -m models.supervise", description=__doc__, args=ours)
    if not command:
        print("say what to run after --, as in: -- python -m models.train digits", file=sys.stderr)
        return 2
    return supervise(command, how)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What comes before the first `--`, and what after it."""
    if "--" not in arguments:
        return list(arguments), []
    at = list(arguments).index("--")
    return list(arguments[:at]), list(arguments[at + 1 :])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

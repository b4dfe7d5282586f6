"""`--dry-run`: the step of a run is compiled, and judged, and nothing is trained.

What judges it lies above the trainer: `python -m bench dry-run`, which this starts as a user would.
So the trainer works without it, and imports nothing of it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

FLAG = "--dry-run"


def asked(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Takes `--dry-run` or `--dry-run SLICE` out of a command line.

    Args:
      arguments: what follows `python -m models.train`.

    Returns:
      The slice, such as "v4:8x8x16", empty for this machine's devices, or None where nothing is
      asked; and the other arguments.
    """
    rest = list(arguments)
    if FLAG not in rest:
        return None, rest
    at = rest.index(FLAG)
    named = at + 1 < len(rest) and ":" in rest[at + 1] and not rest[at + 1].startswith("-")
    where = rest[at + 1] if named else ""
    del rest[at : at + 1 + named]
    return where, rest


def run(where: str, arguments: Sequence[str]) -> int:
    """Compiles and judges. Returns the status: 0 if the run fits.

    Args:
      where: as `asked` gives it.
      arguments: the config and its changes.
    """
    options = ["--topology", where] if where else []
    command = [sys.executable, "-m", "bench", "dry-run", *options, "--", *arguments]
    return subprocess.run(command, check=False).returncode

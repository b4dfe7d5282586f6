"""What every result says about itself, as JSON: predicted or measured, on what, when, by what code.

    {"kind": "predicted" | "measured", "command": str, "chip": str, "date": str, "commit": str,
     "versions": {package: version}, "host": {...}, "result": {...}}

A number without this beside it is not a result. A model's number is "predicted", whatever it was
checked against; "measured" is the clock of a device that ran.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import subprocess
from importlib import metadata
from typing import Any, Literal

from models.files import atomically

Kind = Literal["predicted", "measured"]

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "numpy", "torch", "timm")


@dataclasses.dataclass(frozen=True)
class Record:
    """One result with its circumstances.

    Args:
      kind: "predicted" or "measured".
      command: the subcommand of `python -m bench` that made it.
      chip: the chip it is about: a name of `collective_matmul.hardware`, or a jax device kind.
      result: the numbers; whatever `json` can write.
      date: of the result, in UTC.
      commit: of the code, with a + where files were changed since; "" outside of a git checkout.
      versions: of Python and of the packages that had a say.
      host: the machine that ran the command, which for a prediction is not the chip.
    """

    kind: Kind
    command: str
    chip: str
    result: dict[str, Any]
    date: str = dataclasses.field(default_factory=lambda: _now())
    commit: str = dataclasses.field(default_factory=lambda: commit())
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: versions())
    host: dict[str, Any] = dataclasses.field(default_factory=lambda: host())

    def __post_init__(self) -> None:
        if self.kind not in ("predicted", "measured"):
            raise ValueError(f"kind={self.kind!r} is neither 'predicted' nor 'measured'")

    def save(self, path: pathlib.Path) -> pathlib.Path:
        """Writes the record as JSON, whole or not at all; what is not finite becomes null."""
        text = json.dumps(finite(dataclasses.asdict(self)), indent=1, allow_nan=False)
        with atomically(path) as draft:
            draft.write_text(text + "\n", encoding="utf-8")
        return path

    def __str__(self) -> str:
        """The circumstances in a line."""
        told = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.kind} for {self.chip}, {self.date}, commit {self.commit or 'none'}, {told}"


def load(path: pathlib.Path) -> Record:
    """The record in a file that `save` made.

    Raises:
      ValueError: if the file is no such record.
    """
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no result of bench: {error}") from error


def finite(value: Any) -> Any:
    """`value` with nan and infinity replaced by None, for which JSON has no other name."""
    if isinstance(value, dict):
        return {str(key): finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def commit() -> str:
    """The commit of this checkout, with a + where tracked files differ from it, or ""."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def versions() -> dict[str, str]:
    """Python and the packages that are installed, with their versions."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def host() -> dict[str, Any]:
    """The machine without its name: system, processor, cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": platform.system(), "machine": platform.machine(), "cores": cores}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()

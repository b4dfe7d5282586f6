"""The last schedules of the TPU compiler, as text: in a process that asks for them.

The compiler writes schedules only if it is told so before it is loaded, and then of every operation
of every program: gigabytes for a training step, and twice the time for a product. A process that
compiles little, or little else than kernels, can ask; others start one that does (`alone`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import tempfile

from collective_matmul.inspect import bundles

_ARGUMENTS = "LIBTPU_INIT_ARGS"


@dataclasses.dataclass(frozen=True)
class Issued:
    """What a kernel issues in a run.

    Args:
      bundles: of one core; None if it is not known.
      why: it is not.
    """

    bundles: int | None
    why: str = ""


def ask() -> None:
    """Has the compiler write schedules; to be called before anything loads it."""
    asked = (
        os.environ.get(_ARGUMENTS, ""),  # the last of two counts, should a parent have asked
        f"--xla_jf_dump_to={_folder().name}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=final_bundles",
    )
    os.environ[_ARGUMENTS] = " ".join(asked).strip()


def forget() -> None:
    """Deletes what was written: names of operations are not unique among programs."""
    for path in pathlib.Path(_folder().name).glob("*"):
        path.unlink()


def written(instruction: str) -> Issued | None:
    """What a kernel issues, of the program that was compiled since `forget`.

    Args:
      instruction: its name in the compiled program.

    Returns:
      None if nobody asked, and nothing was written of it.
    """
    found = [
        path
        for path in pathlib.Path(_folder().name).glob(f"*-{instruction}-*final_bundles.txt")
        if "schedule-analysis" not in path.name
    ]
    if not found:
        return None
    if len(found) > 1:
        return Issued(None, f"the compiler wrote {len(found)} schedules of it")
    schedule = bundles.parse(found[0].read_text(encoding="utf-8"))
    why = f"its schedule does not tell {schedule.why}" if schedule.why else ""
    return Issued(schedule.cycles, why)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Is deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="schedules-")

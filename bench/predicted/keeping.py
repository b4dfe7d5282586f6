"""What a command that predicts leaves in a folder: its record, a timeline and a trace."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from bench.predicted.comparison import tell
from bench.predicted.prediction import Prediction, accuracy
from bench.record import Record
from collective_matmul.hardware import Chip


def keep(
    folder: pathlib.Path,
    name: str,
    *,
    command: str,
    options: Any,
    chip: Chip,
    result: dict[str, Any],
    drawn: Prediction | None,
) -> None:
    """Writes `NAME.json`, and the timeline and the trace of one prediction; says so on stderr.

    Args:
      folder: where to.
      name: of the record.
      command: the subcommand of `python -m bench`.
      options: what it was asked for, a dataclass.
      chip: that it was predicted for.
      result: as JSON takes it.
      drawn: the prediction to draw, if there is one with a program.
    """
    asked = {key: str(value) for key, value in dataclasses.asdict(options).items()}
    told = {"options": asked, "accuracy": accuracy(chip), **result}
    paths = [Record("predicted", command, chip.name, told).save(folder / f"{name}.json")]
    if drawn is not None and drawn.report is not None:
        paths += [folder / "timeline.png", folder / "trace.json"]
        drawn.report.draw(paths[-2])
        drawn.report.trace(paths[-1])
    tell(f"wrote {', '.join(map(str, paths))}")

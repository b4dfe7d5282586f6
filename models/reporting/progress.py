"""What a person sees of a run: lines that stay, and below them one that moves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import rich.progress
from rich.console import Console

COLUMNS = (
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(bar_width=24),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TextColumn("{task.fields[numbers]}"),
    rich.progress.TimeRemainingColumn(compact=True),
    rich.progress.TextColumn("left"),
)


class Progress:
    """The line of one run; made by `progress`."""

    def __init__(self, console: Console, bar: rich.progress.Progress, steps: int) -> None:
        self.console = console
        self.bar = bar
        self.steps = steps
        self.task = bar.add_task("training", total=steps, numbers="")

    def step(
        self, step: int, numbers: Mapping[str, float], rates: Mapping[str, float], waited: float
    ) -> None:
        """Moves the line.

        Args:
          step: how many steps were made.
          numbers: of the last one: "loss" and "accuracy", and "applied" where it may be 0.
          rates: as `Speed.rates` gives them.
          waited: the share of its time that it waited for data.
        """
        parts = [
            f"loss {numbers['loss']:.4f}",
            f"accuracy {numbers['accuracy']:6.1%}",
            f"{rates['images_per_second']:,.0f} images/s",
            f"{rates['tokens_per_second_per_device']:,.0f} tokens/s/device",
        ]
        if "mfu" in rates:
            parts.append(f"MFU {rates['mfu']:.1%}")
        if waited >= 0.005:
            parts.append(f"data {waited:.0%}")
        if not numbers.get("applied", 1.0):
            parts.append("NOT APPLIED")
        self.bar.update(self.task, completed=step, numbers="  ".join(parts))

    def say(self, text: str) -> None:
        """Leaves a line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(steps: int, *, visible: bool) -> Iterator[Progress]:
    """The line of a run, for as long as the block lasts.

    Args:
      steps: steps in the whole run.
      visible: whether this process is the one that speaks.
    """
    console = Console(quiet=not visible)
    moving = rich.progress.Progress(
        *COLUMNS, console=console, transient=True, disable=not (visible and console.is_terminal)
    )
    with moving as bar:
        yield Progress(console, bar, steps)

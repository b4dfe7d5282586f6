"""What a person sees of a run: lines that stay, and below them one that moves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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

    def step(self, step: int, loss: float, accuracy: float, rate: float, seconds: float) -> None:
        """Moves the line: after `step` updates, `rate` images and `seconds` of the last one."""
        numbers = (
            f"loss {loss:.4f}  accuracy {accuracy:6.1%}  {rate:,.0f} images/s  "
            f"{1e3 * seconds:.0f} ms/step"
        )
        self.bar.update(self.task, completed=step, numbers=numbers)

    def say(self, text: str) -> None:
        """Leaves a line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(steps: int, *, visible: bool) -> Iterator[Progress]:
    """The line of a run, for as long as the block lasts.

    Args:
      steps: updates in the whole run.
      visible: whether this process is the one that speaks.
    """
    console = Console(quiet=not visible)
    moving = rich.progress.Progress(
        *COLUMNS, console=console, transient=True, disable=not (visible and console.is_terminal)
    )
    with moving as bar:
        yield Progress(console, bar, steps)

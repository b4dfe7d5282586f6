"""What can be wrong with a checkpoint: it is damaged, or it is another model's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SHOWN = 5  # differences that a message lists


@dataclasses.dataclass(frozen=True)
class Damage:
    """One thing that is wrong with one checkpoint.

    Args:
      step: the checkpoint's.
      what: what was found, a sentence without its full stop.
      file: the damaged file, relative to the checkpoint's folder; None if none can be named.
      parameters: the names of the arrays that are affected, as far as they are known.
    """

    step: int
    what: str
    file: str | None = None
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"{self.file}: " if self.file else ""
        return f"checkpoint of step {self.step}: {where}{self.what}{of(self.parameters)}"


class Damaged(RuntimeError):
    """No checkpoint that was asked for can be restored; `damages` says why."""

    def __init__(self, message: str, damages: Sequence[Damage]) -> None:
        super().__init__("\n  ".join([message, *map(str, damages)]))
        self.damages = list(damages)


class Mismatch(ValueError):
    """A checkpoint of another model, optimiser, dtype or schema; `differences` lists all."""

    def __init__(self, path: str, differences: Sequence[str]) -> None:
        super().__init__(
            f"{path} is not a checkpoint of this run:\n  {listed(differences)}\n"
            "Restore it with the config it was saved with, or choose another folder"
        )
        self.differences = list(differences)


def of(parameters: Sequence[str]) -> str:
    """`" (holds a, b and 3 more)"`, or nothing."""
    if not parameters:
        return ""
    shown = ", ".join(parameters[:SHOWN])
    more = f" and {len(parameters) - SHOWN} more" if parameters[SHOWN:] else ""
    return f" (holds {shown}{more})"


def listed(lines: Sequence[str]) -> str:
    """The first lines, and how many more there are."""
    more = [f"and {len(lines) - SHOWN} more"] if lines[SHOWN:] else []
    return "\n  ".join([*lines[:SHOWN], *more])


def differing(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two nested dictionaries, `"model.width: 32 in the checkpoint, 64 here"`.

    Args:
      saved, wanted: of the checkpoint, and of this run. Numbers, texts, None, lists, dictionaries.
    """
    before, now = dict(_flat(saved)), dict(_flat(wanted))
    return [
        f"{name}: {before.get(name, 'nothing')} in the checkpoint, {now.get(name, 'nothing')} here"
        for name in [*before, *(name for name in now if name not in before)]
        if name not in before or name not in now or before[name] != now[name]
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value

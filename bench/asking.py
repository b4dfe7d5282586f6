"""Arguments of a command read into a dataclass, whose docstrings are the help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import tyro

Kind = TypeVar("Kind")


def read(kind: type[Kind], command: str, about: str | None, arguments: Sequence[str]) -> Kind:
    """The options of `python -m bench <command>`; prints help or a mistake, and exits, if so asked.

    Args:
      kind: a dataclass with a docstring under each field.
      command: the first word after `python -m bench`.
      about: what `--help` says of it.
      arguments: the words after the command.
    """
    return tyro.cli(
        kind,
        prog=f"python -m bench {command}",
        description=about,
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )

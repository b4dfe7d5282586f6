"""The experiments: one file each, which defines `CONFIG`. Its name is what the command line calls.

The docstring of a file gives the source of its numbers, the command, and the result to expect.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType

import tyro

from models.config import Config


def names() -> tuple[str, ...]:
    """The experiments there are: the files of this folder."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> Config:
    """The config of an experiment.

    Args:
      name: one of `names()`.

    Raises:
      ValueError: if there is no such file.
    """
    config: Config = _module(name).CONFIG
    return config


def from_command_line(arguments: Sequence[str]) -> Config:
    """`NAME [--field value ...]`: an experiment with some of its fields changed.

    An unknown field, or a value that is not one, ends the process with status 2 and says what was
    meant; so does `--help`, with status 0, and lists all fields.

    Args:
      arguments: what follows `python -m models.train`.
    """
    if not arguments or arguments[0].startswith("-"):
        listing = "\n".join(f"  {name:12} {_summary(name)}" for name in names())
        asked = arguments and arguments[0] in ("-h", "--help")
        text = f"usage: python -m models.train CONFIG [--field value ...]\n\n{listing}"
        raise SystemExit(print(text) if asked else text)
    name, *changes = arguments
    try:
        module = _module(name)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return tyro.cli(
        Config,
        prog=f"python -m models.train {name}",
        description=module.__doc__,
        default=module.CONFIG,
        args=changes,
        config=(tyro.conf.FlagConversionOff,),
    )


def _module(name: str) -> ModuleType:
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names())}"
        raise ValueError(f"no experiment {name!r}: there is no models/configs/{name}.py; {hint}")
    return importlib.import_module(f"{__name__}.{name}")


def _summary(name: str) -> str:
    return (_module(name).__doc__ or "").partition("\n")[0]

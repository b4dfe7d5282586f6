"""The experiments: one file each, which defines `CONFIG`. Its name is what the command line calls.

The docstring of a file gives the source of its numbers, the command, and the result to expect.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import pathlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import tyro

from models.config import Config
from models.files import atomically


def names() -> tuple[str, ...]:
    """The experiments there are: the files of this folder."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def load(name: str) -> Config:
    """The config of an experiment.

    Args:
      name: one of `names()`.

    Raises:
      ValueError: if there is no such file.
    """
    config: Config = _module(name).CONFIG
    return config


def from_command_line(arguments: Sequence[str], prog: str = "python -m models.train") -> Config:
    """`NAME [--field value ...]`: an experiment with some of its fields changed.

    An unknown field, or a value that is not one, ends the process with status 2 and says what was
    meant; so does `--help`, with status 0, and lists all fields.

    Args:
      arguments: what follows the command.
      prog: the command.
    """
    if not arguments or arguments[0].startswith("-"):
        listing = "\n".join(f"  {name:12} {summary(name)}" for name in names())
        asked = arguments and arguments[0] in ("-h", "--help")
        text = f"usage: {prog} CONFIG [--field value ...]\n\n{listing}"
        raise SystemExit(print(text) if asked else text)
    name, *changes = arguments
    try:
        module = _module(name)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return tyro.cli(
        Config,
        prog=f"{prog} {name}",
        description=module.__doc__,
        default=module.CONFIG,
        args=changes,
        config=(tyro.conf.FlagConversionOff,),
    )


def save(config: Config, path: pathlib.Path) -> None:
    """Writes a config as JSON, with everything that the command line changed."""
    with atomically(path) as draft:
        draft.write_text(json.dumps(dataclasses.asdict(config), default=str, indent=2) + "\n")


def flat(config: Any) -> dict[str, str]:
    """The fields of a config, and of its parts: {"optim.lr": "0.001"}."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{name}": text for name, text in flat(value).items()}
        else:
            found[field.name] = str(value)
    return found


def described(config: Config) -> str:
    """A run on this machine's devices, in one line."""
    name, kind = config.out.name, jax.devices()[0].device_kind
    if config.devices == 1:
        return f"{name} on one {kind}"
    what = "simulated devices" if kind == "cpu" else f"x {kind}"
    data, fsdp, tensor = config.mesh
    return (
        f"{name} on {config.devices} {what} ({data} data x {fsdp} fsdp x {tensor} tensor), "
        f"{config.layout}, {config.algorithm or 'any algorithm'}, {config.backend or 'any backend'}"
    )


def _module(name: str) -> ModuleType:
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names())}"
        raise ValueError(f"no experiment {name!r}: there is no models/configs/{name}.py; {hint}")
    return importlib.import_module(f"{__name__}.{name}")


def summary(name: str) -> str:
    """The first line of an experiment's docstring."""
    return (_module(name).__doc__ or "").partition("\n")[0]

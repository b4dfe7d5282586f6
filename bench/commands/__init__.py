"""The subcommands of `python -m bench`: one file each, and no list of them.

`bench/commands/NAME.py` is `python -m bench NAME` (a dash in the name is an underscore in the
file's). It defines `main(arguments) -> int`, the exit status; the first line of its docstring is
what `python -m bench --help` says about it.
"""

from __future__ import annotations

import ast
import pathlib
import pkgutil


class UserError(ValueError):
    """A request that cannot be fulfilled: its message is all that the user sees, with status 2."""


def names() -> tuple[str, ...]:
    """The subcommands there are."""
    modules = pkgutil.iter_modules(__path__)
    return tuple(sorted(module.name.replace("_", "-") for module in modules))


def module_of(name: str) -> str:
    """The dotted name of a subcommand's module."""
    return f"{__name__}.{name.replace('-', '_')}"


def summary(name: str) -> str:
    """What a subcommand does, in a line; its module is read, not run."""
    path = pathlib.Path(__path__[0], f"{name.replace('-', '_')}.py")
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]

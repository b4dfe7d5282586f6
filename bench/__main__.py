"""`python -m bench NAME ...`: runs a subcommand; see `bench.commands`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from bench import commands


def main(arguments: Sequence[str]) -> int:
    """Runs the subcommand that the first argument names, and returns its exit status."""
    listing = "\n".join(f"  {name:14} {commands.summary(name)}" for name in commands.names())
    usage = f"usage: python -m bench NAME [--option value ...]\n\n{listing}"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in commands.names():
        near = difflib.get_close_matches(name, commands.names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"no subcommand {name!r}{hint}\n\n{usage}", file=sys.stderr)
        return 2
    try:
        status: int = importlib.import_module(commands.module_of(name)).main(rest)
    except commands.UserError as error:
        print(f"python -m bench {name}: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

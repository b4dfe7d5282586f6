"""Shows configs: `python -m models.configs list | show NAME [--field value ...] | diff A B`.

`show` prints every field with what the command line changed, as a run would have it; `diff` prints
the fields in which two experiments differ.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from models import configs


def main(arguments: Sequence[str]) -> int:
    """What the command line asks for. Returns the status; of `diff` 1 if the two differ."""
    what, *rest = arguments or [""]
    if what == "list" and not rest:
        for name in configs.names():
            print(f"{name:16} {configs.summary(name)}")
        return 0
    if what == "show" and rest:
        asked = configs.from_command_line(rest, prog="python -m models.configs show")
        for name, value in configs.flat(asked).items():
            print(f"{name} = {value}")
        return 0
    if what == "diff" and len(rest) == 2:
        return _diff(*rest)
    print(__doc__, file=sys.stderr)
    return 2


def _diff(first: str, second: str) -> int:
    try:
        one, two = (configs.flat(configs.load(name)) for name in (first, second))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    different = [name for name in one if one[name] != two[name]]
    for name in different:
        print(f"{name}: {one[name]} -> {two[name]}")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

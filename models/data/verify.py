"""Checks packed images: `python -m models.data.verify OUT` compares every shard with its checksum.

Of a shard that differs, every record is read and decoded, and those that are damaged are named. A
run notices damage as well, when it reads a record; this tells before.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import tyro

from models.data import manifest as manifests
from models.data.images import Unreadable
from models.data.pictures import check
from models.data.sources.records import Records


@dataclasses.dataclass(frozen=True)
class Verifying:
    """Checks packed images."""

    out: Annotated[pathlib.Path, tyro.conf.Positional]
    """the folder of the shards"""


def main(arguments: Sequence[str]) -> int:
    """Says what is damaged, and returns the exit status: 0 if nothing is."""
    root = tyro.cli(Verifying, prog="python -m models.data.verify", args=arguments).out
    try:
        found = list(damages(root))
    except ValueError as error:
        found = [str(error)]
    print("\n".join(found) if found else f"every shard of {root} is the one that was written")
    return 1 if found else 0


def damages(root: pathlib.Path) -> Iterator[str]:
    """What is wrong with a folder of shards, one sentence for each record or shard.

    Raises:
      ValueError: if it has no manifest, or a damaged one.
    """
    manifest = manifests.load(root)
    records = Records(root, manifest, shape=(1, 1, 3), columns=0)  # no image is made
    first = 0
    for shard in manifest.shards:
        if complaint := manifests.complaint(root, shard):
            yield complaint
        elif manifests.sha256(root / shard.file) != shard.sha256:
            yield f"the shard {root / shard.file} is not the one that was written"
            for sample in range(first, first + shard.records):
                try:
                    check(records.read(sample))
                except Unreadable as error:
                    yield str(error)
        first += shard.records


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

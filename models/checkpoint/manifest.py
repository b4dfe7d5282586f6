"""What a checkpoint should hold, in one JSON file that is written last and checks itself.

A folder without it is no checkpoint. The `check` at its end is a digest of all the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from models.checkpoint.damage import Mismatch, differing
from models.checkpoint.files import File

NAME = "manifest.json"
SCHEMA = 1
# What makes the content of an older schema's manifest one of the next: {from: content -> content}.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


class Unreadable(Exception):
    """There is no manifest, or it is damaged; the text says which."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint should hold.

    Args:
      step: how many updates were made.
      arrays: {name: {"shape": [..], "dtype": "float32", "sum": 16 hexadecimal digits}}.
      extra: what the run keeps beside its arrays.
      identity: what must be the same in a run that continues this one.
      files: {file relative to the checkpoint: its size and digest}.
    """

    step: int
    arrays: dict[str, dict[str, Any]]
    extra: dict[str, Any]
    identity: dict[str, Any]
    files: dict[str, File]

    def write(self, folder: pathlib.Path) -> None:
        """Writes it, and waits until it is on the disk."""
        content = {"schema": SCHEMA, **dataclasses.asdict(self)}
        with (folder / NAME).open("w", encoding="utf-8") as file:
            json.dump({**content, "check": _check(content)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def read(folder: pathlib.Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
      Unreadable: if it is missing or damaged.
      Mismatch: if its schema is newer than this program, or older and no migration is known.
    """
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        check = content.pop("check")
    except FileNotFoundError:
        raise Unreadable("is missing: the checkpoint was never complete") from None
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise Unreadable(f"cannot be read ({type(error).__name__})") from None
    if check != _check(content):
        raise Unreadable("was changed after it was written")
    schema = content.pop("schema")
    while schema in MIGRATIONS:
        content = MIGRATIONS[schema](content)
        schema += 1
    if schema != SCHEMA:
        raise Mismatch(str(folder), differing({"schema": schema}, {"schema": SCHEMA}))
    files = {
        name: File(f["size"], f["digest"], tuple(f["holds"]))
        for name, f in content["files"].items()
    }
    return Manifest(**{**content, "files": files})


def complete(folder: pathlib.Path) -> bool:
    """Whether a folder has a manifest, which is written when all else is there."""
    try:
        read(folder)
    except (Unreadable, Mismatch):
        return False
    return True


def compare(
    manifest: Manifest, wanted: Mapping[str, Any], identity: Mapping[str, Any], path: pathlib.Path
) -> None:
    """Refuses the checkpoint of another model, optimiser or dtype.

    Args:
      manifest: of the checkpoint.
      wanted: {name: array or `jax.ShapeDtypeStruct`} of all that will be restored.
      identity: of this run.
      path: the checkpoint, for the message.

    Raises:
      Mismatch: with what differs.
    """
    saved = {name: f"{x['dtype']}{x['shape']}" for name, x in manifest.arrays.items()}
    here = {name: f"{x.dtype}{list(x.shape)}" for name, x in wanted.items()}
    found = differing(manifest.identity, identity) + differing(saved, here)
    if found:
        raise Mismatch(str(path), found)


def _check(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

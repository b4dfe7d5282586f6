"""The files of a checkpoint: their sizes, their digests, and which arrays each of them holds.

Sizes are compared before anything is read. Digests only tell which file it was: whether a
checkpoint is good is decided by the values that come out of it (`sums`). Small files, which
describe the others, are compared by digest at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pathlib
from collections.abc import Iterable, Mapping

import tensorstore

SMALL = 65_536  # bytes


@dataclasses.dataclass(frozen=True)
class File:
    """A file as it was when its checkpoint was written.

    Args:
      size: bytes.
      digest: BLAKE2b of 128 bits, in hexadecimal.
      holds: the arrays that have values in it.
    """

    size: int
    digest: str
    holds: tuple[str, ...] = ()


def described(folder: pathlib.Path, names: Iterable[str]) -> dict[str, File]:
    """Size and digest of files that were just written, and are on the disk afterwards."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            digest = _digest(file)
            found[name] = File(os.fstat(file.fileno()).st_size, digest)
    return found


def below(folder: pathlib.Path, part: str = "") -> list[str]:
    """The files below a part of a folder, relative to the folder."""
    paths = sorted((folder / part).rglob("*"))
    return [str(path.relative_to(folder)) for path in paths if path.is_file()]


def wrong(folder: pathlib.Path, files: Mapping[str, File]) -> dict[str, str]:
    """What can be seen without reading the arrays: {file: what is wrong with it}."""
    found = {}
    for name, file in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            found[name] = "is missing" if isinstance(error, FileNotFoundError) else str(error)
            continue
        if size != file.size:
            found[name] = f"has {size:,} bytes of {file.size:,}"
        elif size <= SMALL:
            found |= changed(folder, {name: file})
    return found


def changed(folder: pathlib.Path, files: Mapping[str, File]) -> dict[str, str]:
    """What is found by reading files from end to end: {file: what is wrong with it}."""
    found = {}
    for name, file in files.items():
        try:
            with (folder / name).open("rb") as opened:
                if _digest(opened) != file.digest:
                    found[name] = "was changed after it was written"
        except OSError as error:
            found[name] = f"cannot be read ({error.strerror})"
    return found


def holdings(folder: pathlib.Path) -> dict[str, tuple[str, ...]]:
    """Which arrays have values in which files: {file: names}, from the tree of an OCDBT database.

    Args:
      folder: where the database is. Its keys begin with an array's name and a slash.
    """
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{folder}/"}).result()
    root = tensorstore.ocdbt.dump(store).result()["versions"][-1]["root"]
    found: dict[str, set[str]] = {}
    nodes = [(root["location"], "")] if "location" in root else []
    while nodes:
        node, prefix = nodes.pop()
        for entry in tensorstore.ocdbt.dump(store, node).result()["entries"]:
            if "location" in entry:
                nodes.append((entry["location"], prefix + entry["subtree_common_prefix"].decode()))
            else:
                name = (prefix + entry["key"].decode()).partition("/")[0]
                file = _file(entry.get("indirect_value", node))
                found.setdefault(file, set()).add(name)
    return {file: tuple(sorted(names)) for file, names in found.items()}


def _digest(file: io.BufferedReader) -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _file(location: str) -> str:
    """`"value:ocdbt.process_0/:d/8f3c:0:15182"` is in `"ocdbt.process_0/d/8f3c"`."""
    _, base, name, _, _ = location.split(":")
    return base + name

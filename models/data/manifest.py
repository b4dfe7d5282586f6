"""What a folder of ArrayRecord shards holds, in its manifest.json, and whether it still does.

    {"plan": str, "classes": [str] | null, "multilabel": bool, "samples": int, "fingerprint": str,
     "shards": [{"file", "records", "bytes", "sha256"}], "left_out": {name: reason}}

A record is a line of JSON, {"place": [shard's file, int], "name": str, "labels": [int]}, and after
it the bytes of the image file as they were. ArrayRecord keeps a hash of every record, which reading
checks; the place says that no shard has another's name, and the manifest that none is missing or
cut off. That a shard is the one that was written, to the last bit, is what its sha256 says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from models.data.images import Sample
from models.files import atomically

NAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records.

    Args:
      file: its name.
      records: how many it holds.
      bytes: its size.
      sha256: of all of it, in hexadecimal digits.
    """

    file: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A folder of shards.

    Args:
      plan: stands for what was to be packed, and how.
      classes: the names of the classes in the order of their numbers; None: there are no labels.
      multilabel: whether an image may have several labels.
      samples: records of all shards.
      fingerprint: of the names, labels and classes that were packed.
      shards: in order.
      left_out: images that were not readable when they were packed, and why.
    """

    plan: str
    classes: tuple[str, ...] | None
    multilabel: bool
    samples: int
    fingerprint: str
    shards: tuple[Shard, ...]
    left_out: dict[str, str]

    def save(self, root: pathlib.Path) -> None:
        """Writes the manifest into a folder, whole or not at all."""
        with atomically(root / NAME) as draft:
            draft.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", "utf-8")


def load(root: pathlib.Path) -> Manifest:
    """The manifest of a folder.

    Raises:
      ValueError: if there is none, or it is damaged.
    """
    path = root / NAME
    try:
        read = json.loads(path.read_text("utf-8"))
        shards = tuple(Shard(**shard) for shard in read.pop("shards"))
        classes = read.pop("classes")
        manifest = Manifest(
            shards=shards, classes=None if classes is None else tuple(classes), **read
        )
    except FileNotFoundError:
        raise ValueError(
            f"{root} holds no {NAME}: pack a folder of images by python -m models.data.pack"
        ) from None
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if manifest.samples != sum(shard.records for shard in shards):
        raise ValueError(f"{path} is damaged: its shards do not hold {manifest.samples} samples")
    return manifest


def complaint(root: pathlib.Path, shard: Shard) -> str | None:
    """What is wrong with a shard as far as its size tells, or None."""
    path = root / shard.file
    if not path.is_file():
        return f"the shard {path} is missing: its {shard.records} records are"
    if (size := path.stat().st_size) != shard.bytes:
        return f"the shard {path} has {size} bytes and not {shard.bytes}: it is cut off, or another"
    return None


def sha256(path: pathlib.Path) -> str:
    """Of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def packed(file: str, record: int, sample: Sample) -> bytes:
    """A record.

    Args:
      file: the name of its shard.
      record: its number there.
      sample: a picture as a file, and its name in the folder it is from.
    """
    if not isinstance(sample.picture, bytes):
        raise TypeError(f"{sample.name} is no image file, but an array")
    head = {"place": [file, record], "name": sample.name, "labels": sample.labels}
    return json.dumps(head).encode() + b"\n" + sample.picture


def unpacked(data: bytes, file: str, record: int) -> Sample:
    """What `packed` has made of a sample.

    Raises:
      ValueError: if it has made it in another place.
    """
    head, _, picture = data.partition(b"\n")
    told: dict[str, Any] = json.loads(head)
    if told["place"] != [file, record]:
        raise ValueError(f"it was written as record {told['place'][1]} of {told['place'][0]}")
    return Sample(picture, tuple(told["labels"]), told["name"])
